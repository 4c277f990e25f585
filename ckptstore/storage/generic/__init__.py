"""Objects wherever fsspec reaches: Google, Azure, SFTP, the web and many others."""

from ckptstore.storage.generic.storage import GenericStorage

__all__ = ["GenericStorage"]
