"""Objects in an S3 bucket."""

from ckptstore.storage.s3.storage import S3Storage

__all__ = ["S3Storage"]
