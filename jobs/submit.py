"""`curate submit <job> …`: run a job on a Ray cluster by Ray's Job SDK. Submitting the same work twice is one job."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from dataclasses import asdict

from conf.schema import settings
from curate.errors import ConfigError, CurateError
from curate.runtime import jobs
from jobs.app import FAILED, compose_config
from jobs.cli import JOBS


def prepared(job: str, overrides: list[str], shipped: bool) -> tuple[str, list[str]]:
    """Submission id and options of a job.

    The id is made of the job and its composed settings; the cluster it runs on and the order of options do not matter.
    The options carry the store, which may come from this machine's environment.

    Raises:
        ConfigError: a relative path, which on a cluster would lie in a job's temporary folder.
    """
    config = settings(compose_config(job, overrides))
    places = {"sink.url": [config.sink.url], "sink.store": [config.sink.store]}
    if not shipped:
        places["source.url"] = [config.source.url] if isinstance(config.source.url, str) else config.source.url
    for what, urls in places.items():
        for url in urls:
            if "://" not in url and not url.startswith("/"):
                raise ConfigError(
                    f"{what} is {url!r}, a relative path: on a cluster it would lie in a job's temporary folder. "
                    f"Give a URL (s3://…) or an absolute path that all nodes share."
                )
    body = asdict(config)
    body.pop("cluster")
    digest = hashlib.blake2b(json.dumps([job, body], sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    store = [] if any(o.startswith("sink.store=") for o in overrides) else [f"sink.store={config.sink.store}"]
    return f"curate-{job}-{digest}", [*overrides, *store]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="curate submit", description="Submit a job to a Ray cluster. Options of the job follow it, as name=value."
    )
    parser.add_argument("job", help="which job: " + ", ".join(j for j in JOBS if j != "submit"))
    parser.add_argument("overrides", nargs="*", help="options of the job, name=value")
    parser.add_argument(
        "--address",
        default=None,
        help="the dashboard's address; default RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265",
    )
    parser.add_argument(
        "--working-dir", default=None, help="folder to ship with the job; not needed where the image has curate"
    )
    parser.add_argument("--wait", action="store_true", help="print the job's log until it ends; exit with its status")
    return parser


def main() -> None:
    """Submit, or find the job that was submitted before; prints its id and state."""
    args = _parser().parse_intermixed_args()
    try:
        if args.job not in JOBS or args.job == "submit":
            raise ConfigError(
                f"there is no job {args.job!r} to submit; choose from {', '.join(j for j in JOBS if j != 'submit')}"
            )
        name, given = prepared(args.job, args.overrides, args.working_dir is not None)
        command = shlex.join(["python", "-m", f"jobs.{args.job}", *given])
        client = jobs.client(args.address)
        state = jobs.submit(client, name, command, args.working_dir)
        print(f"{name}: {state}")
        if args.wait:
            for text in jobs.follow(client, name):
                sys.stdout.write(text)
                sys.stdout.flush()
            ended = jobs.state(client, name)
            print(f"{name}: {ended}")
            sys.exit(0 if ended == "SUCCEEDED" else 1)
    except CurateError as e:
        print(f"curate submit: {e}", file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
