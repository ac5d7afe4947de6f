"""Thirteen ways in which a TCP connection ends, one after the other.

    python3 examples/deaths.py                 all, and a table of them
    python3 examples/deaths.py --slow          a second between steps
    python3 examples/deaths.py --step          Enter goes on to the next step
    python3 examples/deaths.py --only vanish   one; or several: fin,rst or 1,3
    python3 examples/deaths.py --kernel        the kernel's record, too (root)

Each death has three twins: connections to which the same thing happens at the
same time.  Asking a socket takes its error away, so one twin is there to be
asked: poll(), TCP_INFO, SO_ERROR and MSG_PEEK, in this order.  The second one
belongs to a bare asyncio Protocol, the third to tcpops; their rows show all
that the program is told.  In front are the seconds since the last act.

poll() says IN (something can be read, if only the end), OUT (send would not
wait), RDHUP (nothing more will come), HUP (both directions are over) and ERR.
TCP_INFO counts the segments that our kernel has sent again.  For MSG_PEEK,
EAGAIN means: no data, and no end.
"""

if __name__ == "__main__":
    import quiet  # before the rest: it may be interrupted there

import argparse
import asyncio
import contextlib
import errno
import itertools
import math
import os
import select
import shutil
import socket
import struct
import sys
import textwrap
import time
from typing import Callable, NamedTuple

from facts import LINUX
from kernel import FACTS, SEGMENTS, Kernel
from twins import Asked, Bare, Ours
from vanish import full_backlog, go_there, pair, vanish

now = time.monotonic
GRACE = 0.2  #: seconds that the other twins have after the end of ours
DRIP = 0.2   #: seconds between bytes of a peer that sends again and again
STEP = math.inf  #: seconds between steps: until Enter is pressed
#: Columns of a slide; the table at the end is always that of the widest.
WIDTH = max(60, min(98, shutil.get_terminal_size((98, 24)).columns))


# -- the deaths --------------------------------------------------------------


def close(twin):
    twin.peer.close()


def half_close(twin):
    twin.peer.shutdown(socket.SHUT_WR)


def reset(twin):
    # SO_LINGER with a time of 0 makes close() send RST instead of FIN.
    twin.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                         struct.pack("ii", 1, 0))
    twin.peer.close()


def data_and(end):
    return lambda twin: (twin.peer.send(b"data"), end(twin))


def drop(twin):
    vanish(twin.peer)


def drip(twin):
    with contextlib.suppress(OSError):  # we have closed
        twin.peer.send(b"x")


def talk(twin):
    """Have the peer read, and send another byte unless it hears of the end."""
    with contextlib.suppress(BlockingIOError):
        while twin.peer.fileno() >= 0:
            try:
                data = twin.peer.recv(100, socket.MSG_DONTWAIT)
                what = str(data or "FIN")
            except ConnectionError as error:
                data, what = b"", errno.errorcode[error.errno]
            twin.heard += f", {what}" if twin.heard else what
            if not data:
                twin.peer.close()
    drip(twin)


def last_words(twin):
    drip(twin)  # so that there is unread data
    twin.send(b"bye")
    twin.close()


def set_lifetime(twin):
    if isinstance(twin, Ours):  # the others have none
        twin.ops.tcp_set_connection_lifetime(twin.conid, 1)


def answer(asked, *_):
    """Send into a connection whose end is known."""
    asked.send(b"answer")
    if asked.peer.fileno() >= 0:
        return f"answer: the peer reads {asked.peer.recv(100)}"
    return f"answer: an RST comes back, SO_ERROR {asked.ask()['SO_ERROR']}"


def ask_again(asked, *_):
    """Ask a socket whose error has been taken."""
    return ", ".join(" ".join(answer) for answer in asked.ask().items())


def both_heard(_, bare, ours):
    return f"asyncio's peer read {bare.heard}; the peer of tcpops {ours.heard}"


def nowhere():
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock  # which does not listen


class Death(NamedTuple):
    """A way to die.  Acts are functions of one twin."""

    name: str
    title: str
    peer: str                   #: what the peer does, in words
    means: str
    act: Callable = lambda twin: None
    again: Callable = None      #: what the peer repeats
    we: str = ""                #: what we do then
    do: Callable = lambda twin: None
    after: Callable = None      #: (all twins): what comes of it, in words
    framing: str = "raw"
    target: Callable = None     #: makes what we connect to; else we are

    @property
    def vanishes(self):
        """Whether the peer does, which is not to be had everywhere."""
        return self.name.startswith("vanish")


CLOCK = "1 s of silence, 1 probe, 1 s for its answer"
DEATHS = [
    Death("fin", "FIN", "closes its socket", act=close, after=answer,
          means="A FIN says: I send no more.  Whether anyone still reads, only"
                " sending to it can show."),
    Death("half-close", "Half-close", "shuts down its sending half, and goes"
          " on reading", act=half_close, after=answer,
          means="The same segment, and so the same report.  But this peer"
                " still reads.  asyncio closes here, unless eof_received()"
                " returns True."),
    Death("rst", "RST", "resets the connection", act=reset, after=ask_again,
          means="An RST ends both directions.  The error is there once:"
                " SO_ERROR took it, and MSG_PEEK shows a clean end of file."
                "  TCP_INFO (CLOSE) and poll (HUP) contradict that; but which"
                " error it was, they do not know."),
    Death("rst-behind-data", "RST behind unread data", "sends 4 bytes, and"
          " resets the connection", act=data_and(reset),
          means="MSG_PEEK shows the data as if nothing had happened.  Data"
                " first: it is handed over, then the reset is reported."),
    Death("fin-behind-data", "FIN behind unread data", "sends 4 bytes, and"
          " closes its socket", act=data_and(close),
          means="MSG_PEEK shows the data, and hides the FIN behind it."
                "  poll (RDHUP) and TCP_INFO (CLOSE_WAIT) know."),
    Death("vanish", "Vanished while idle", "vanishes: its kernel drops"
          " whatever comes in", act=drop, we=f"turn keepalive on: {CLOCK}",
          do=lambda twin: twin.keepalive(),
          means="Nothing comes in, so nothing is noticed unless one asks."
                "  Keepalive asks; no answer is ETIMEDOUT."),
    # Its silence begins with our second byte: --slow does not prolong it.
    Death("vanish-in-flight", "Vanished with data in flight", "acknowledges"
          " our first byte, and vanishes: its kernel drops whatever comes in",
          we=f"send two bytes; keepalive: {CLOCK}",
          do=lambda twin: (twin.send(b"x"), drop(twin), twin.send(b"x"),
                           twin.keepalive()),
          means="With data in flight the kernel does not probe; it repeats the"
                " data, for some 15 minutes.  tcpops keeps keepalive's promise"
                " by a clock of its own."),
    Death("shut-window", "Shut window", "lives, but reads nothing",
          we="send 8 MB; send_timeout is 1 s",
          do=lambda twin: twin.send(bytes(1 << 23)),
          means="The peer's kernel answers probes: alive, but no room."
                "  Our kernel would wait for ever; only a limit of our own"
                " ends it."),
    Death("refused", "Refused", "does not listen", target=nowhere,
          we="connect", do=lambda twin: twin.connect(),
          means="An RST answers our SYN: the machine lives, but no program"
                " listens on that port (or a firewall refuses)."),
    Death("black-hole", "Black hole", "does not answer: its backlog is full,"
          " so its kernel drops our SYN", target=lambda: full_backlog()[0],
          we="connect; connect_timeout is 1.5 s",
          do=lambda twin: twin.connect(),
          means="No answer is no error.  The kernel repeats its SYN for a"
                " minute or two, and there is no error to ask for."),
    Death("drip", "Dripping message", "sends a byte every 0.2 s, but no end"
          " of its line; message_timeout is 1 s", act=drip, again=drip,
          framing="line",
          means="Each byte is a sign of life, so no clock of idleness runs"
                " out.  message_timeout counts from the first byte."),
    Death("lifetime", "Lifetime", "lives, and is silent",
          we="set its lifetime to 1 s", do=set_lifetime,
          means="Nothing is wrong with this connection.  It has been idle for"
                " longer than we allow."),
    Death("own-close", "Our own close while the peer sends", "sends a byte"
          " every 0.2 s until it hears of the end", act=drip, again=talk,
          we="send b'bye', and close (the one that is asked: shut down)",
          do=last_words, after=both_heard,
          means="close() on unread data sends an RST, which can cost the peer"
                " our last bytes.  tcpops sends a FIN, and reads on until the"
                " peer's."),
]
KERNEL = {"RST": "an RST came", "1 bytes": "1 byte came",
          "CLOSE_WAIT": "a FIN came: CLOSE_WAIT",
          "LAST_ACK": "our FIN left: LAST_ACK", "CLOSE": "it is over: CLOSE",
          "FIN_WAIT1": "our FIN left: FIN_WAIT1", "again": "sent again",
          "FIN_WAIT2": "our FIN is acknowledged: FIN_WAIT2"}


# -- the show ----------------------------------------------------------------


async def turn(twins, seconds, enough=lambda: False, again=None):
    """Have both loops turn, and the peers repeat what they do."""
    end, tick = now() + seconds, now() + DRIP
    while now() < end and not enough():
        twins[2].ops.step(0)
        if again and now() >= tick:
            tick += DRIP
            for twin in twins:
                again(twin)
        await asyncio.sleep(0.001)


async def pause(twins, seconds):
    """Let time pass between two steps, or wait until Enter is pressed."""
    await turn(twins, seconds, lambda: seconds == STEP and select.select(
        [0], [], [], 0)[0])
    while seconds == STEP and os.read(0, 1) not in (b"\n", b""):
        pass


def row(who, what, seconds=None):
    """Print one row of a slide."""
    when = "" if seconds is None else f"{seconds:.3f} s"
    print(textwrap.fill(what, WIDTH, initial_indent=f"{when:>8}  {who:8}  ",
                        subsequent_indent=" " * 20), flush=True)


def counted(words):
    """Yield each word once, with the number of times it follows itself."""
    for word, group in itertools.groupby(words):
        count = len(list(group))
        yield f"{word} {count} times" if count > 1 else word


def in_words(word):
    """Return what stands on a slide for a word of kernel.py."""
    if word.startswith("error"):
        return f"error {errno.errorcode[int(word[6:])]}"
    return KERNEL.get(word, f"{word} came" if "bytes" in word else word)


def recorded(facts, since):
    """Yield (seconds, words) for what the kernel recorded of one twin."""
    for word, group in itertools.groupby(facts, lambda fact: fact[1]):
        times = [when - since for when, _ in group]
        (words,) = counted([in_words(word)] * len(times))
        yield times[0], words


def made(death, files):
    """Return the three twins, connected unless that is what it is about."""
    twins = [Asked(), Bare(), Ours()]
    target = death.target and files.enter_context(death.target()).getsockname()
    for twin in twins:
        files.callback(twin.stop)
        twin.target = target
        if not target:
            sock, twin.peer = pair()
            twin.adopt(sock, death.framing)
            files.enter_context(twin.peer)
    return twins


async def happen(death, twins, slow, kernel):
    """Announce and do what is done, and wait for the end; return when the
    last act was.
    """
    for who, words, act in (("peer", death.peer, death.act),
                            ("we", death.we, death.do)):
        if words:
            row(who, words)
            await pause(twins, slow)
            if kernel:
                kernel.take()
            since = now()
            for twin in twins:
                act(twin)
    asked, bare, ours = twins
    await turn(twins, 20, lambda: ours.over, death.again)
    await turn(twins, GRACE, lambda: bare.over and asked.over, death.again)
    return since


async def show(death, slow, kernel):
    """Let three twins die, and show what is known; return the table's row."""
    with contextlib.ExitStack() as files:
        asked, bare, ours = twins = made(death, files)
        await turn(twins, 0.02)  # asyncio takes its socket over
        since = await happen(death, twins, slow, kernel)
        seconds, answers = now() - since, asked.ask()
        facts = kernel.take()[ours.event.Rp, ours.event.sp] if kernel else ()
        if slow == STEP:
            row("?", "What will SO_ERROR say?")
            await pause(twins, slow)
        for who, what in answers.items():
            row(who, what, seconds if who == "poll" else None)
        for who, twin in ("asyncio", bare), ("tcpops", ours):
            await pause(twins, slow)
            row(who, "; ".join(counted(twin.told)) or "nothing",
                twin.at and twin.at - since)
        if kernel:
            row("kernel", "(of tcpops' socket)")
        for when, words in recorded(facts, since):
            row("kernel", words, when)
        await pause(twins, slow)
        if death.after:
            row({answer: "we", ask_again: "again"}.get(death.after, "peer"),
                death.after(*twins))
        print(textwrap.indent(textwrap.fill(death.means, WIDTH - 10),
                              " " * 10), flush=True)
        await pause(twins, slow)
    return [death.name, answers["poll"], answers["TCP_INFO"].split(",")[0],
            answers["SO_ERROR"], answers["MSG_PEEK"], bare.outcome,
            ours.event.reason]


async def run(deaths, slow=0, kernel=None, missing=""):
    """Show deaths, and a table of them if there are several; return whether
    any was shown.
    """
    table = [["", "poll", "TCP_INFO", "SO_ERROR", "MSG_PEEK", "asyncio",
              "tcpops"]]
    for death in deaths:
        print(f"\n{DEATHS.index(death) + 1:8}  {death.title}", flush=True)
        if missing and death.vanishes:
            row("left out", missing)
        else:
            table.append(await show(death, slow, kernel))
    print()
    if table[2:]:
        for cells in table:
            print("{:17}{:21}{:13}{:13}{:13}{:13}{}".format(*cells))
        print(" " * 17 + "asyncio: the error that connection_lost() is given,"
              " or that is raised")
    return table[1:] != []


def chosen(text):
    """Return the names of the deaths that --only names, or numbers."""
    names = [death.name for death in DEATHS]
    words = [word.strip().lower() for word in text.split(",")]
    for number, name in enumerate(names, 1):
        words = [name if word == str(number) else word for word in words]
    for word in words:
        if word not in names:
            raise argparse.ArgumentTypeError(
                f"no death is called {word!r}; the names are"
                f" {', '.join(names)}")
    return words


def main():
    names = [death.name for death in DEATHS]
    parser = argparse.ArgumentParser(
        usage="deaths.py [--slow | --step] [--only NAME[,NAME]] [--kernel]",
        description=__doc__, epilog=textwrap.fill(
            f"The names: {', '.join(names)}.", 79),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--slow", dest="slow", action="store_const", const=1, default=0,
        help="a second between steps; each act is announced before")
    how.add_argument(
        "--step", dest="slow", action="store_const", const=STEP,
        help="wait for Enter instead; and ask what SO_ERROR will say")
    add = parser.add_argument
    add("--only", metavar="NAMES", type=chosen, default=names,
        help="these deaths alone, by name or number")
    add("--kernel", action="store_true",
        help="also what the kernel recorded of the third twin; needs root")
    parser.error = lambda text: parser.exit(2, f"deaths.py: {text}\n")
    options = parser.parse_args()
    if not LINUX:
        parser.error("this needs Linux")
    if options.slow == STEP and sys.stdin is None:  # 0 may be a socket
        parser.error("--step needs a standard input")
    deaths = [death for death in DEATHS if death.name in options.only]
    missing, kernel = "", None
    with contextlib.ExitStack() as files:
        try:
            if options.kernel:
                kernel = Kernel(FACTS + SEGMENTS)
                files.callback(kernel.close)
        except OSError as error:
            parser.error(f"--kernel needs root, Linux and tracefs: {error}")
        try:
            if any(death.vanishes for death in deaths):
                go_there()
        except OSError as error:
            missing = f"it needs root, or unshare -Urn: {error}"
        return not asyncio.run(run(deaths, options.slow, kernel, missing))


if __name__ == "__main__":
    sys.exit(main())
