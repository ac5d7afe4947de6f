"""The facts about Linux on which tcpops.py rests, each tried on this kernel.

    python3 examples/facts.py
    unshare -Urnm python3 examples/vanish.py python3 examples/facts.py

Prints the section, whether the fact holds, and what this kernel showed: of a
socket the state (1 ESTABLISHED, 2 SYN_SENT, 7 CLOSE, 8 CLOSE_WAIT, 10 LISTEN),
SO_ERROR read twice, and recv, which only looks (MSG_PEEK).  The status is 1 if
a fact does not hold.
"""

if __name__ == "__main__":
    import quiet  # before the rest: it may be interrupted there

import argparse
import errno
import selectors
import socket
import struct
import sys
import timeit
from pathlib import Path

from vanish import TCP, full_backlog, pair, unreachable, vanish, wait

SOURCE = Path(__file__).resolve().parent.parent / "tcpops.py"
LINUX = hasattr(selectors, "EpollSelector")
ERROR = socket.SOL_SOCKET, socket.SO_ERROR
#: What stands behind a fact about a socket; see look.
HEADING = ("of a socket: TCP state (7 CLOSE, 8 CLOSE_WAIT), SO_ERROR, again,"
           " recv")


def said(call, *args):
    """Return what a call returns; the error, also of SO_ERROR, by name."""
    try:
        result = call(*args)
    except OSError as error:
        result = error.errno
    return errno.errorcode.get(result, result)


def info(sock):
    """Return the bytes of TCP_INFO; the first one is the state."""
    return sock.getsockopt(TCP, socket.TCP_INFO, 60)


def look(sock):
    """Return the state, SO_ERROR read twice, and what MSG_PEEK shows."""
    return [info(sock)[0], *(said(sock.getsockopt, *ERROR) for _ in range(2)),
            said(sock.recv, 9, socket.MSG_PEEK | socket.MSG_DONTWAIT)]


def deadlines():
    """Deadlines"""
    with selectors.DefaultSelector() as selector:
        waits = timeit.Timer(lambda: selector.select(0.0013)).repeat(20, 1)
    yield ("a selector rounds a wait up, here 1.3 ms",
           [f"{1000 * min(waits):.2f} ms"], min(waits) >= 0.0013)


def keepalive():
    """Keepalive"""
    pairs = [pair() for _ in range(6)]
    idle, flight, limited, stuck, shut, killed = (sock for sock, _ in pairs)
    for name, most in (("IDLE", 32767), ("INTVL", 32767), ("CNT", 127)):
        option = getattr(socket, f"TCP_KEEP{name}")
        yield (f"TCP_KEEP{name} may be 1 to {most}, not 0 or {most + 1}", [
            value for value in (0, 1, most, most + 1)
            if said(idle.setsockopt, TCP, option, value) is None], [1, most])
        for sock, _ in pairs:
            sock.setsockopt(TCP, option, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for sock in (limited, killed):
        sock.setsockopt(TCP, socket.TCP_USER_TIMEOUT, 1000)
    for sock in (stuck, shut, killed):
        sock.send(bytes(1 << 23), socket.MSG_DONTWAIT)
    root = "EPERM" not in [said(vanish, peer) for _, peer in pairs[:4]]
    for sock in (flight, limited):
        sock.send(b"x")
    wait(flight)  # 3 s, for it lives
    good, dead = [1, 0, 0, "EAGAIN"], [7, "ETIMEDOUT", 0, b""]
    yield "keepalive finds a vanished idle peer", root and look(idle), dead
    yield "it does not if data is in flight", root and look(flight), good
    yield "TCP_USER_TIMEOUT then does", root and look(limited), dead
    yield "a living peer may keep its window shut", look(shut), good
    yield "TCP_USER_TIMEOUT kills such a peer", look(killed), dead
    counts = [info(flight)[2], info(stuck)[3]]
    yield ("TCP_INFO's 3rd byte counts retransmissions, its 4th probes",
           root and counts, min(counts) > 1)
    ages, ends = [], pair()
    for sender, receiver in (ends, ends[::-1]):
        wait(ends[0], seconds=0.15)  # silence
        sender.send(b"x")
        wait(receiver)
        ages += struct.unpack("52xII", info(ends[0]))
    yield ("an ACK renews the 13th number of TCP_INFO, and data the 12th",
           ages[:3], ages[0] > 100 > max(ages[1:3]))
    with socket.socket(socket.AF_UNIX) as sock:
        yield ("a socket that is not TCP has no TCP_INFO",
               [said(info, sock)], [errno.errorcode[errno.EOPNOTSUPP]])


def probing():
    """Probing a socket"""
    yield ("reading SO_ERROR clears it, and recv() then says EOF",
           look(pair(end="RST")[0]), [7, "ECONNRESET", 0, b""])
    sock, _ = pair(end="RST")
    yield ("a MSG_PEEK that raises consumes the error, too",
           [said(sock.recv, 1, socket.MSG_PEEK), *look(sock)],
           ["ECONNRESET", 7, 0, 0, b""])
    yield ("MSG_PEEK shows no FIN behind data; TCP_INFO says CLOSE_WAIT, 8",
           look(pair(b"data", "FIN")[0]), [8, 0, 0, b"data"])
    yield ("MSG_PEEK shows data even after an RST; SO_ERROR has the RST",
           look(pair(b"data", "RST")[0]), [7, "ECONNRESET", 0, b"data"])
    yield ("an RST that follows a FIN is EPIPE",
           look(pair(end="FIN", answer=b"x")[0]), [7, "EPIPE", 0, b""])
    sock, _ = pair()
    yield ("SO_ERROR returns, and clears, an ICMP error; the connection lives",
           said(unreachable, sock) != "EPERM" and look(sock),
           [1, "EHOSTUNREACH", 0, "EAGAIN"])
    server, sock, fresh = full_backlog()
    yield "a connecting socket looks quiet", look(sock), [2, 0, 0, "EAGAIN"]
    yield ("recv() on a listener, or one never connected, says ENOTCONN",
           look(server) + look(fresh),
           [10, 0, 0, "ENOTCONN", 7, 0, 0, "ENOTCONN"])


def main(tries=(deadlines, keepalive, probing)):
    """Try each fact and print it; return 1 if one does not hold, else 0."""
    text, failed = SOURCE.read_text(encoding="utf-8"), 0
    print(f"{HEADING:>{22 + len(HEADING)}}", flush=True)
    for facts in tries:
        number = text.split(f". {facts.__doc__}\n")[0].split()[-1]
        for fact, shown, wanted in facts() if LINUX else [("all", False, 0)]:
            verdict = ("not tried" if shown is False else
                       "yes" if wanted in (True, shown) else "no")
            failed |= verdict == "no"
            print(f"section {number}  {verdict:9}  {fact}:",
                  *shown or ["this needs Linux and root"], flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda text: parser.exit(2, f"facts.py: {text}\n")
    parser.parse_args()
    sys.exit(main())
