"""The frame of every program: command line, configuration, and a user's mistake as one line."""

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from torch.distributed.elastic.multiprocessing.errors import record

from config import CommandLine, ConfigError, Option, Resolved, Section, add_args_from_yaml, parse_command_line
from utils.ddp import environment_local_rank
from utils.stopping import Stopped

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what a disk says that takes no more
T = TypeVar("T", bound=Section)


def run_program(
    doc: str,
    folder: Path,
    schema: type[T],
    options: Sequence[Option],
    body: Callable[[Resolved[T], CommandLine], None],
    default_config: Path | None = None,
) -> int:
    """`run_group` of a program that takes one configuration: the last one named."""
    return run_group(doc, folder, schema, options, lambda every, command: body(every[-1], command), default_config)


def run_group(
    doc: str,
    folder: Path,
    schema: type[T],
    options: Sequence[Option],
    body: Callable[[list[Resolved[T]], CommandLine], None],
    default_config: Path | None = None,
) -> int:
    """Run `body` on the configurations that the command line names; exit status 2 for a wrong configuration, 1 for a
    failed run, 128 + signal for a stopped one. Traceback of a user's mistake only with --debug."""
    debug = any(word.replace("-", "_") == "__debug" or word == "debug=true" for word in sys.argv[1:])

    def attempt() -> int:
        try:
            command = parse_command_line(sys.argv[1:], doc, options, default_config)
            every = [
                add_args_from_yaml(schema, path, (*command.overrides, *own), folder) for path, own in command.configs
            ]
        except ConfigError as error:
            return complain(error, 2, debug)
        try:
            body(every, command)
        except ConfigError as error:
            return complain(error, 1, debug)
        except OSError as error:
            if error.errno not in FULL:
                raise
            place = f"{error.filename}: " if error.filename else ""
            remedy = "free space or choose another save_dir, then run the same command again"
            return complain(ConfigError(f"{place}cannot be written ({error.strerror}): {remedy}"), 1, debug)
        except Stopped as error:
            if environment_local_rank() == 0:
                print(error, file=sys.stderr, flush=True)
            return error.status
        return 0

    # What gets through is a fault of the program: the launcher shows its traceback.
    return record(unless_pipe_closes)(attempt) or 0


def unless_pipe_closes(attempt: Callable[[], int]) -> int:
    """The status of an attempt; 128 + SIGPIPE, in silence, where nobody reads its output (`--dry_run | head`)."""
    try:
        try:
            status = attempt()
        except SystemExit as left:  # --help
            status = int(left.code or 0)
        print(end="", flush=True)
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
        return 128 + signal.SIGPIPE


def complain(error: Exception, status: int, debug: bool) -> int:
    """Print a user's mistake once: local rank 0 at once, the others only if they are still alive a little later."""
    if debug:
        raise error
    if environment_local_rank() != 0:
        # Every rank meets the same mistake; the launcher ends this one as soon as rank 0 has left.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
        print(f"[rank {os.environ.get('RANK')}] ", end="", file=sys.stderr)
    print(error, file=sys.stderr, flush=True)
    return status


def leave(status: int) -> NoReturn:
    """End the process with everything written, and without the destructors of C++ libraries: gloo's sometimes abort."""
    logging.shutdown()  # run_program has flushed standard output
    print(end="", file=sys.stderr, flush=True)
    os._exit(status)
