"""A bucket as storage of Ray Train, by pyarrow as Ray's guide has it."""

from collections.abc import Mapping

from pyarrow.fs import S3FileSystem


def bucket_files(environment: Mapping[str, str]) -> S3FileSystem:
    """The server as Ray's storage."""
    return S3FileSystem(
        access_key=environment["AWS_ACCESS_KEY_ID"],
        secret_key=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=environment["AWS_ENDPOINT_URL"].removeprefix("http://"),
        region=environment["AWS_DEFAULT_REGION"],
        scheme="http",
    )
