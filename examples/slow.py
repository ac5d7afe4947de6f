"""What small examples share: where tcpops.py is, and their command line.

    python3 examples/states.py --slow

announces each step and waits for a second: time to think what will come, or to
look at the connection from outside, say with "ss -tno".  Limits that would
then be over too soon take ten times as long.
"""

import quiet  # before the rest: it may be interrupted there

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tcpops


def address(text):
    try:
        return tcpops.parse_address(text)
    except ValueError as error:  # of which argparse would not show the words
        raise argparse.ArgumentTypeError(error)


parser = argparse.ArgumentParser(
    description=sys.modules["__main__"].__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--slow", action="store_true",
                    help="announce each step, and wait a second before it")
parser.set_defaults(listen=None)
if "--listen" in (parser.description or ""):
    parser.add_argument(
        "--listen", metavar="HOST:PORT", type=address,
        help="stay up, and serve there")
parser.error = lambda text: parser.exit(2, f"{parser.prog}: {text}\n")
options = parser.parse_args()
pace = 10 if options.slow else 1  #: times as long: what would be over too soon


def last_words(kind, error, trace):
    """Say in a line why --listen cannot be had."""
    if options.listen and issubclass(kind, OSError):
        print("%s: %s:%d:" % (parser.prog, *options.listen), error.strerror,
              file=sys.stderr)
    else:
        quiet.last_words(kind, error, trace)


sys.excepthook = last_words


def soon(step):
    """With --slow: announce a step, and wait for a second."""
    if options.slow:
        print(f"  next: {step}", flush=True)
        time.sleep(1)
