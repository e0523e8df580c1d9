"""`curate submit <job> …`: run a job on a Ray cluster by Ray's Job SDK. Submitting the same work twice is one job.

`curate submit list`, `status ID`, `logs ID`, `stop ID`: see after what was submitted. Only the job's options travel;
the cluster's image has the code.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from curate.errors import ConfigError, CurateError, near
from jobs.cli import JOBS

if TYPE_CHECKING:
    from curate.runtime.jobs import Attempt

FAILED = 2
VERBS = {
    "list": "what was submitted to the cluster",
    "status": "the attempts at a job; exit status 0 when the newest has succeeded, else 1",
    "logs": "what a job has said; of several attempts, the newest",
    "stop": "end a job; what it committed stays, and submitting it again goes on",
}
RECURRING = ("audit",)
"""Jobs that have something to do each time: one that has succeeded is started again."""


def prepared(job: str, overrides: list[str], shipped: bool) -> tuple[str, list[str]]:
    """Submission id and options of a job.

    The id is made of the job and its composed settings; the cluster it runs on and the order of options do not matter.
    The options carry the store, which may come from this machine's environment.

    Raises:
        ConfigError: a relative path, which on a cluster would lie in a job's temporary folder.
    """
    from conf.schema import settings  # not for status, logs and stop
    from jobs.app import compose_config
    from jobs.work import work_name

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
    store = [] if any(o.startswith("sink.store=") for o in overrides) else [f"sink.store={config.sink.store}"]
    return work_name(job, config), [*overrides, *store]


def _with_address(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    where = "the dashboard's address; default RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265"
    parser.add_argument("--address", default=None, help=where)
    return parser


def _parser() -> argparse.ArgumentParser:
    more = "\n".join(f"  curate submit {verb + (' ID' if verb != 'list' else ''):<11} {VERBS[verb]}" for verb in VERBS)
    parser = argparse.ArgumentParser(
        prog="curate submit",
        description="Submit a job to a Ray cluster. Options of the job follow it, as name=value.",
        epilog=f"afterwards:\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", help="which job: " + ", ".join(JOBS))
    parser.add_argument("overrides", nargs="*", help="options of the job, name=value")
    _with_address(parser)
    parser.add_argument(
        "--working-dir", default=None, help="folder to ship with the job; not needed where the image has curate"
    )
    parser.add_argument("--wait", action="store_true", help="print the job's log until it ends; exit with its status")
    parser.add_argument("--again", action="store_true", help="run also where the same work has succeeded before")
    return parser


def _verb_parser(verb: str) -> argparse.ArgumentParser:
    parser = _with_address(argparse.ArgumentParser(prog=f"curate submit {verb}", description=VERBS[verb]))
    if verb != "list":
        parser.add_argument("id", help="as `curate submit` and `curate submit list` print it")
    if verb in ("list", "status"):
        parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    if verb == "logs":
        parser.add_argument("--follow", action="store_true", help="as it is written, until the job ends")
    return parser


def main() -> None:
    """Submit, or find the job that was submitted before, and print its id and state; or see after one."""
    given = sys.argv[1:]
    try:
        sys.exit(_see_after(given[0], given[1:]) if given and given[0] in VERBS else _submit(given))
    except CurateError as e:
        print(f"curate submit: {e}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        print("curate submit: interrupted; what was submitted goes on", file=sys.stderr)
        sys.exit(130)


def _submit(given: list[str]) -> int:
    args = _parser().parse_intermixed_args(given)
    if args.job not in JOBS:
        raise ConfigError(f"there is no job {args.job!r} to submit{near(args.job, [*JOBS, *VERBS])}")
    work, options = prepared(args.job, args.overrides, args.working_dir is not None)
    from curate.runtime import jobs

    client = jobs.client(args.address)
    command = shlex.join(["python", "-m", f"jobs.{args.job}", *options])
    again = args.again or args.job in RECURRING
    name, state = jobs.submit(client, work, command, args.working_dir, {"work": work, "job": args.job}, again)
    print(f"{name}: {state}", flush=True)
    if not args.wait:
        return 0
    for text in jobs.follow(client, name):
        sys.stdout.write(text)
        sys.stdout.flush()
    ended = jobs.state(client, name)
    print(f"{name}: {ended}")
    return 0 if ended == "SUCCEEDED" else 1


def _see_after(verb: str, given: list[str]) -> int:
    from curate.runtime import jobs

    args = _verb_parser(verb).parse_args(given)
    client = jobs.client(args.address)
    found = jobs.submissions(client) if verb == "list" else jobs.find(client, args.id)
    if verb in ("list", "status"):
        print(json.dumps([asdict(a) for a in found]) if args.json else _table(found, verb == "status"))
        return 0 if verb == "list" or found[-1].state == "SUCCEEDED" else 1
    name = found[-1].id
    if verb == "stop":
        over = found[-1].over
        print(f"{name}: {found[-1].state if over else jobs.stop(client, name)}{' already' if over else ''}")
        return 0
    texts = jobs.follow(client, name) if args.follow else [jobs.log(client, name)]
    for text in texts:
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def _table(found: list[Attempt], whole: bool) -> str:
    """A line an attempt; `whole`: with its command, and what its end says."""
    if not found:
        return "nothing was submitted to this cluster"
    width = max(len(a.id) for a in found)
    lines = []
    for a in found:
        began = "" if a.began is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(a.began))
        took = "" if a.began is None else f"{(a.ended or time.time()) - a.began:,.0f} s"
        lines.append(f"{a.id:<{width}}  {a.state:<9}  {began:<19}  {took}".rstrip())
        if whole:
            lines.append(f"  {a.command}")
            lines += [f"  {a.message.strip()}"] if a.message and a.over else []
    return "\n".join(lines)


if __name__ == "__main__":
    main()
