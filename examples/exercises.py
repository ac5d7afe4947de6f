"""Ten exercises of rising difficulty, and a check for each.

    python3 examples/exercises.py                     lists them
    python3 examples/exercises.py 3 > my_answer.py    the task of the third
    python3 examples/exercises.py 3 my_answer.py      is that right?

A task is a Python file: its docstring says what to write, and a skeleton
follows, which is wrong.  The check (exercises_checks.py) runs the answer
against real sockets, in several worlds with other numbers each time, and says
what happened in the first world that goes wrong.  The answer has a process of
its own, for 20 s at most.  The exit status is 0 if it is right, 1 if it is
wrong, 2 if it cannot be checked.  solutions.py answers all ten.
"""

if __name__ == "__main__":
    import quiet  # before the rest: it may be interrupted there

import argparse
import contextlib
import json
import linecache
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Callable, NamedTuple, Optional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import exercises_checks as checks
import tcpops
from vanish import where


class Exercise(NamedTuple):
    """A task and its check."""

    title: str
    name: str        #: that an answer defines
    check: Callable  #: takes the object of that name; raises Wrong
    read: str        #: the place in tcpops.py that helps; see place
    task: str
    skeleton: str
    needs: Optional[str] = None  #: a framing, or "vanish"


EXERCISES = (
    Exercise(
        "Idle lifetimes, one for each connection", "lifetimes",
        checks.lifetimes, "def tcp_set_connection_lifetime(", """
Write lifetimes(ops, silent, known).  It prepares a TcpOps that is to listen: a
connection may be idle for `silent` seconds until its first message, and for
`known` seconds from then on.  No connection changes the lifetime of another.
""", """
def lifetimes(ops, silent, known):
    ops.connection_lifetime = silent

    @ops.request_route
    def on_message(msg):
        ops.connection_lifetime = known
"""),
    Exercise(
        "Bound a client that drips", "bound", checks.bound,
        "DEADLINES", """
A client that sends a byte now and then, and never completes its message, holds
a connection for ever.  Write bound(ops, seconds).  It prepares a TcpOps that
is to listen for lines: a message must be complete `seconds` after its first
byte, or its connection ends.  A client may say nothing, or pause between two
messages, for longer than that.
""", """
def bound(ops, seconds):
    ops.connection_lifetime = seconds
"""),
    Exercise(
        "Why does this server miss an RST?", "Server", checks.server,
        "Probing a socket", """
A Server gets a connected socket.  serve() reads it to its end, and returns the
bytes and how they ended: "eof" by a FIN, "reset" by an RST.  A monitor may
call alive() at any time, and more than once: it returns False if the peer has
sent an RST, else True.  Sometimes serve() of the Server below says "eof", and
the peer has sent an RST.  Find out why, and mend it.
""", """
import socket


class Server:
    def __init__(self, sock):
        self.sock = sock

    def alive(self):
        return not self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def serve(self):
        received = b""
        try:
            while data := self.sock.recv(4096):
                received += data
            return received, "eof"
        except ConnectionResetError:
            return received, "reset"
"""),
    Exercise(
        "Notice a peer that has vanished", "watch", checks.watch, "Keepalive",
        """
A host without power sends neither FIN nor RST.  Write watch(ops, limit, gone).
It prepares a TcpOps that is to listen: gone(conid) is called, once, for each
peer that has vanished, when it has been silent for `limit` seconds at the most
(a whole number, 2 or more).  A peer that is silent, but there, stays
connected until its lifetime is over; it has not vanished then, either.  Nor
has one that has sent FIN or RST, or whose connection we end.
""", """
def watch(ops, limit, gone):
    @ops.event_route("tcp:opened")
    def on_open(event):
        ops.tcp_set_connection_lifetime(limit)

    @ops.event_route("tcp:closed")
    def on_end(event):
        gone(event.conid)
""", "vanish"),
    Exercise(
        "Refuse a WebSocket by its path", "rooms", checks.rooms,
        "def refuse(", """
Write rooms(names).  It returns a framing for ops.listen: a WebSocket that
accepts a client which asks for the path /chat/NAME, where NAME is one of
`names`.  A query, as in /chat/NAME?from=7, makes no difference.  Any other
client gets a 403, and its text has the path in it.
""", """
import tcpops


def rooms(names):
    class Rooms(tcpops.WebSocketFraming):
        def refuse(self, path, headers):
            if not path.startswith("/chat/"):
                return "no such room"
    return Rooms
""", "ws"),
    Exercise(
        "Add a framing", "Prefixed", checks.prefixed, "class Framing:", """
Write Prefixed, a tcpops.Framing.  A message is four bytes, which are its
length (big endian), and then so many bytes, perhaps none.  A message that is
longer than self.max_message is a tcpops.ProtocolError as soon as its length is
known.
""", """
import tcpops


class Prefixed(tcpops.Framing):
    def next_message(self):
        length = int.from_bytes(self.buffer[:4], "big")
        payload = bytes(self.buffer[4:4 + length])
        self.buffer.clear()
        return payload

    def encode(self, payload):
        return len(payload).to_bytes(4, "big") + payload
"""),
    Exercise(
        "Close without losing a byte", "answer_and_close",
        checks.answer_and_close, "class Lingering:", """
Write answer_and_close(sock, data, seconds), with Python's socket module alone.
It sends data on a connected, blocking socket, and closes it, so that the peer
gets each byte and then a FIN, even if the peer goes on sending.  It returns
True once the peer has sent its FIN, too, and False if that has not come after
`seconds`, whatever else the peer does or does not do.  Either way the socket
is closed then.
""", """
def answer_and_close(sock, data, seconds):
    sock.sendall(data)
    sock.close()
    return True
"""),
    Exercise(
        "A forwarder: pair the connections", "forwarder", checks.forwarder,
        "def connect(self, host", """
Write forwarder(ops, host, port).  It prepares a TcpOps that is to listen: each
client gets a connection of its own to (host, port), at once, and bytes go both
ways.  When one of the two ends, so does the other, after it was sent each byte
that had come.  If a byte cannot be passed on (send returns -1), both end: a
stream may be cut short, but must never have a hole.
""", """
def forwarder(ops, host, port):
    to_target = {}
    to_client = {}

    @ops.event_route("tcp:opened")
    def on_open(event):
        if event.origin == "accept":
            conid = ops.connect(host, port)
            to_target[event.conid] = conid
            to_client[conid] = event.conid

    @ops.request_route
    def on_request(msg):
        ops.send(to_target[msg.conid], msg.data)

    @ops.onreply_route
    def on_reply(msg):
        ops.send(to_client[msg.conid], msg.data)
"""),
    Exercise(
        "Back pressure: a reader that is too slow", "feed", checks.feed,
        "def send(self, conid", """
Write feed(ops).  It prepares a TcpOps that is to listen for lines, and returns
publish(line), which sends a line (bytes) to each client.  For a client that
does not read we must not hold more than ops.max_write_buffer: the lines that
send refuses are lost.  They are counted for each client by itself; when send
takes a line again, that is b"lost 17" first, if they were 17.
""", """
def feed(ops):
    clients = set()

    @ops.event_route("tcp:opened")
    def on_open(event):
        clients.add(event.conid)

    @ops.event_route("tcp:closed")
    def on_end(event):
        clients.remove(event.conid)

    def publish(line):
        for conid in clients:
            ops.send(conid, line)
    return publish
"""),
    Exercise(
        "Write a conformance scenario", "scenario", checks.scenario,
        "def tcp_close_connection(", """
conformance.py asks an implementation over the wire.  Write scenario(lab), with
its Lab: it returns True for a system that does the following, and False for
one that does not.  A client calls tcp_close_connection with the conid of
another client.  The result is 1; from then on the state of that conid is -1,
and a second call returns -1.  The end is reported once, as tcp:closed, with
that conid.  The client that has asked stays connected.

lab.client() connects.  Its `conid` asks for that; ask(function, conid=...)
calls a function of the specification, and returns its result, a str.
lab.told(client) returns the names of the events of a connection, or "no
event"; lab.ends(client) returns these Events.
""", """
def scenario(lab):
    client, asker = lab.client(), lab.client()
    conid = client.conid
    return asker.ask("tcp_close_connection", conid=conid) == "1"
""", "sip"))

# -- the words for a task -----------------------------------------------------


def place(read):
    """Return the words for a place in tcpops.py: a section's title, or the
    beginning of a line.
    """
    text, section = (HERE.parent / "tcpops.py").read_text(encoding="utf-8"), ""
    for number, line in enumerate(text.split("\n"), 1):
        banner = re.fullmatch(r"# (\d+)\. (.+)", line)
        section = banner[1] if banner else section
        if banner[2] == read if banner else line.strip().startswith(read):
            name = re.sub("def |[(:].*", "", read)
            return f"tcpops.py, line {number}, section {section}: {name}"
    return f"{read} is not in this tcpops.py"


def task(number):
    """Return a task as a Python file: what to write, and a skeleton."""
    one = EXERCISES[number - 1]
    return (f'"""Exercise {number}: {one.title}\n{one.task}\n'
            f"To read: {place(one.read)}\n"
            f"To check: python3 examples/exercises.py {number} my_answer.py\n"
            f'"""\n{one.skeleton}')

# -- the process of an answer -------------------------------------------------


def at(path, number):
    """Return the words for a line of the answer."""
    text = linecache.getline(path, number).strip()
    return f"line {number} of {Path(path).name}: {text}"


def what_raised(error, path):
    """Return the words for an exception, and where the answer raised it."""
    words = f"{type(error).__name__}: {error!s:.300}".rstrip(": ")
    number = None
    if isinstance(error, SyntaxError) and error.filename == path:
        words, number = f"{type(error).__name__}: {error.msg}", error.lineno
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            number = trace.tb_lineno
        trace = trace.tb_next
    return (f"the answer raised {words}\n{at(path, number)}" if number
            else f"the check cannot use the answer: {words}")


def judge(one, path):
    """Check an answer; return (whether it is right, the words for it)."""
    try:
        module = types.ModuleType("answer")
        sys.modules["answer"] = module
        exec(compile(Path(path).read_bytes(), path, "exec"), vars(module))
        if not hasattr(module, one.name):
            return False, f"it does not define {one.name}"
        one.check(getattr(module, one.name))
    except checks.Wrong as wrong:
        text = str(wrong)
    except BaseException as error:  # sys.exit() is no way out
        text = what_raised(error, path)
    else:
        return True, f"in {len(checks.WORLDS)} worlds"
    return False, "\n".join([text, *(f"tcpops has logged: {line}"
                                     for line in checks.LOG.lines[-1:])])


def child(one, path, limit, descriptor):
    """Be the process of an answer: write the verdict to a descriptor."""
    pid = os.getpid()

    def tell(right, text):
        if os.getpid() != pid:  # the answer has forked
            os._exit(0)
        with contextlib.suppress(SystemExit):  # its reader has gone
            print(end="", flush=True)
        world = checks.WORLDS[-1] if checks.WORLDS else None
        os.write(descriptor, json.dumps([right, text[:2000], world]).encode())
        os._exit(0)  # whatever else the answer has started

    def too_long(_, frame):
        while frame and frame.f_code.co_filename != path:
            frame = frame.f_back
        tell(False, f"no end to it within {limit} s\n" + (
            at(path, frame.f_lineno) if frame else "the check waited"))
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(limit)
    log = logging.getLogger("tcpops")
    log.addHandler(checks.LOG)
    log.propagate = False
    tell(*judge(one, path))


def check(number, path, limit):
    """Check an answer in a process of its own; return as judge does."""
    one = EXERCISES[number - 1]
    words = where() if one.needs == "vanish" else []
    reading, writing = os.pipe()
    with open(reading, "rb") as verdict, subprocess.Popen(
            [*words, sys.executable, str(Path(__file__).resolve()),
             str(number), path, "--limit", str(limit), "--verdict",
             str(writing)],
            stdin=subprocess.DEVNULL, pass_fds=[writing],
            start_new_session=True) as process:  # Ctrl-C is for us
        os.close(writing)
        try:
            process.wait(limit + 3)
        except subprocess.TimeoutExpired:  # it heeds no signal, either
            return False, f"no end to it within {limit + 3} s"
        finally:
            process.kill()
            process.wait()
        os.set_blocking(reading, False)
        told = verdict.read()
    if not told:
        return False, ("the answer has ended the process of the check, with"
                       f" the status {process.returncode}")
    right, text, world = json.loads(told)
    if not right and world:
        text = f"{world}:\n{text}"
    return right, text

# -- the command line ---------------------------------------------------------


def main():
    """Return the exit status."""
    parser = argparse.ArgumentParser(
        description="Ten exercises, and a check for each.")
    parser.error = lambda text: parser.exit(2, f"exercises.py: {text}\n")
    parser.add_argument("number", nargs="?", type=int, metavar="NUMBER",
                        choices=range(1, len(EXERCISES) + 1),
                        help="print the task of this exercise")
    parser.add_argument("file", nargs="?", metavar="FILE",
                        help="say whether this is an answer to it")
    parser.add_argument("--limit", type=int, default=20, metavar="SECONDS",
                        help="for the check; the default is 20")
    parser.add_argument("--verdict", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    number, path = options.number, os.path.abspath(options.file or "")
    if options.limit < 1:
        parser.error("--limit must be 1 or more")
    if number is None:
        for number, one in enumerate(EXERCISES, 1):
            print(f"{number:2}  {one.title}")
        return 0
    if options.file is None:
        print(task(number), end="")
        return 0
    one = EXERCISES[number - 1]
    if options.verdict is not None:
        child(one, path, options.limit, options.verdict)
    try:
        open(path, "rb").close()
        if one.needs not in (None, "vanish", *tcpops.FRAMINGS):
            raise OSError(place(one.read))
        right, text = check(number, path, options.limit)
    except OSError as error:
        parser.error(f"exercise {number} cannot be checked: {error}")
    if right:
        print(f"Right: exercise {number}, {one.title}, {text}")
        return 0
    print(f"Wrong: exercise {number}, {one.title}")
    for line in [*text.split("\n"), f"To read: {place(one.read)}"]:
        print(textwrap.fill(line, 79, initial_indent="    ",
                            subsequent_indent="    "))
    return 1


if __name__ == "__main__":
    sys.exit(main())
