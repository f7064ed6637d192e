"""A client for the worker: it sends a request, waits, and downloads the files, also over a network that fails.

    from client import Client

    client = Client.endpoint("ENDPOINT_ID", os.environ["RUNPOD_API_KEY"])
    result = client.run({"model": "wan22_14b_t2v", "loras": [...], "prompts": [...]}, on_progress=print)
    paths = client.download(result, Path("videos"))

It imports no more of the worker than its request schema and errors. `python -m client` does the same on the command line.
Every error is a ClientError with a `code`.
"""

from client.client import Client
from client.errors import (
    ClientError,
    DownloadFailed,
    InvalidRequest,
    JobFailed,
    JobNotFound,
    JobStopped,
    NotAuthorized,
    Refused,
    SubmissionUnknown,
    Unreachable,
)
from client.result import FailedPrompt, Health, Output, Picture, Progress, Result

__all__ = [
    "Client",
    "ClientError",
    "DownloadFailed",
    "FailedPrompt",
    "Health",
    "InvalidRequest",
    "JobFailed",
    "JobNotFound",
    "JobStopped",
    "NotAuthorized",
    "Output",
    "Picture",
    "Progress",
    "Refused",
    "Result",
    "SubmissionUnknown",
    "Unreachable",
]
