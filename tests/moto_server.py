"""moto's server, in which one object is put at a time: S3 checks If-Match and If-None-Match and writes in one step, and
moto looks first and writes then, so that two writers may both win."""

from __future__ import annotations

import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

_LOCK = threading.Lock()
_put = S3Response.put_object


def _one_at_a_time(self: S3Response) -> Any:
    with _LOCK:
        return _put(self)


if __name__ == "__main__":
    S3Response.put_object = _one_at_a_time
    main()
