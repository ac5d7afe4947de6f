"""How examples end on Ctrl-C, and where no one reads them; import it first.

Ctrl-C ends them without words, even while they import other modules.  So does
a reader of their output that has gone, as of "| head -1"; that the output
cannot be written for another reason, as on a full disk, is said in one line.
Both are exceptions that leave even TcpOps.run(): all is undone on the way.
"""

import atexit
import io
import os
import sys


class Output(io.FileIO):
    """Standard output, of a program that ends where it cannot be written."""

    failed = False

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left
            if not isinstance(error, BrokenPipeError):
                print(f"{os.path.basename(sys.argv[0])}: standard output:"
                      f" {error.strerror}", file=sys.stderr, flush=True)
            raise SystemExit(1)


def write_the_rest():
    """Do so at the very end, for Python would tell of an exception."""
    try:
        sys.stdout.flush()
    except SystemExit:
        pass
    if output.failed:
        os._exit(1)  # whatever the status was to be


def last_words(kind, error, trace):
    """Print a traceback, but none of Ctrl-C."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = last_words
if sys.stdout is not None:  # nor is there any if it was closed
    output = Output(1, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        output if sys.stdout.write_through else io.BufferedWriter(output),
        encoding=sys.stdout.encoding, errors=sys.stdout.errors,
        line_buffering=sys.stdout.line_buffering,
        write_through=sys.stdout.write_through)
    atexit.register(write_the_rest)
