"""Answers that are believed only where they are all that such an answer must be.

What stands between here and the server may answer in its place: with "not found" for everything, or with a 200 that
says nothing. Taken at its word, a store would be empty.
"""

from __future__ import annotations

from typing import Any

from ckptstore.storage.s3.client import Call
from ckptstore.storage.s3.failures import Incomplete, is_missing


async def told(call: Call, method: str, **parameters: Any) -> dict[str, Any]:
    """The answer to what needs no object to be there.

    Raises:
        Incomplete: it was that there is none.
    """
    try:
        return await call(method, **parameters)
    except Exception as error:
        if is_missing(error):
            raise Incomplete("the answer was that there is no such object, and none is needed") from error
        raise


async def listing(call: Call, method: str, **parameters: Any) -> dict[str, Any]:
    """One page of a listing.

    Raises:
        Incomplete: this is none.
    """
    page = await told(call, method, **parameters)
    if "IsTruncated" not in page:
        raise Incomplete("the answer is no listing")
    return page


async def about_object(call: Call, method: str, *, Key: str, **parameters: Any) -> dict[str, Any]:  # noqa: N803
    """The answer to a look at an object. That there is none is believed where no listing shows it either.

    Raises:
        Incomplete: the answer is none, or contradicts the listing.
    """
    try:
        answer = await call(method, Key=Key, **parameters)
    except Exception as error:
        if is_missing(error):
            page = await listing(call, "list_objects_v2", Prefix=Key)
            if any(item["Key"] == Key for item in page.get("Contents", [])):
                raise Incomplete("it is listed, and said not to be there") from error
        raise
    return tells_of_object(answer)


async def put_object(call: Call, **parameters: Any) -> None:
    """Put an object.

    Raises:
        Incomplete: the answer doesn't say that it was stored.
    """
    tells_of_object(await told(call, "put_object", **parameters))


def tells_of_object(answer: dict[str, Any]) -> dict[str, Any]:
    """``answer``, if it is about an object that is there.

    Raises:
        Incomplete: it isn't.
    """
    if not answer.get("ETag"):
        raise Incomplete("the answer tells nothing of an object")
    return answer
