"""What one hostile peer can make the process hold, by protocol and stage.

    python3 examples/hostile.py [--only wss] [--connections 50]
    python3 examples/hostile.py --markdown    the table of README.md here

Each stage has a server of its own, a process with the default settings.  The
figure is the growth of its anonymous memory (Python's and OpenSSL's, not the
kernel's socket buffers) per connection, once it has had a third of them.  The
garbage collector is off; a slow clock lets no deadline fire.  Linux only.
"""

if __name__ == "__main__":
    import quiet  # before the rest: it may be interrupted there

import argparse
import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import socket
import ssl
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tcpops

CERTIFICATE = Path(__file__).with_name("localhost.pem")
CLIENT = ssl.create_default_context(cafile=str(CERTIFICATE))
SERVER = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
SERVER.load_cert_chain(str(CERTIFICATE))
FORK, LIBC = multiprocessing.get_context("fork"), ctypes.CDLL(None)
ALL, LIMIT = "raw line sip ws tls wss", 65536  #: max_message
ANSWERS = {b"fill": bytes(4096), b"read": bytes(1 << 20), b"quit": b"bye"}
REQUEST = (b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
           b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
           b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n")
FIELDS = REQUEST + (b"x: " + b"y" * 165 + b"\r\n") * 95 + b"\r\n"
ENDLESS = (REQUEST + b"a: b\r\n" * 9999)[:16384]
#: A ClientHello of 131,396 bytes, the most that OpenSSL takes, is never whole.
HELLO = b"\x16\3\1\x40\0\1" + (131396).to_bytes(3, "big") + bytes(16380) + (
    b"\x16\3\1\x40\0" + bytes(16384)) * 7
CALL = b"OPTIONS sip:a SIP/2.0\r\nContent-Length: %d\r\n\r\n"
SIP_HEAD = (CALL[:23] + b"a: b\r\n" * LIMIT)[:LIMIT]
FRAME = b"\x82\xff" + LIMIT.to_bytes(8, "big") + bytes(LIMIT + 3)
TINY = b"\x81\0\0\0\0x\0" * (LIMIT - 1) + b"\x81\0\0\0\0x"
RECORD = b"\x17\3\3\x40\0" + bytes(16383)
CUT = {"line": bytes(LIMIT - 1), "sip": CALL % 65000 + bytes(64999),
       "ws": FRAME, "tls": RECORD, "wss": FRAME}


def ask(word):
    """Return the messages that ask the server for something."""
    frame = b"\x82\x84\0\0\0\0" + word
    return {"raw": word, "line": word + b"\n", "sip": CALL % 4 + word,
            "ws": frame, "tls": word, "wss": frame}


TCP, HALF, TLS, OPEN = range(4)  #: how far a peer comes before it sends
LIFETIME, MESSAGE = "`connection_lifetime`, 120 s", "`message_timeout`, 20 s"
SIZE, QUEUE = "`max_message`, 65.5 kB", "`max_write_buffer`, 1,049 kB"
HEAD, ONE, NOTHING = "a head, 16.4 kB", "a record, 16.4 kB", "nothing is left"
#: Stage, protocols, share of --connections, how far, what is sent, the bound.
STAGES = [
    ("connected, silent", "raw line sip", 4, TCP, b"", LIFETIME),
    ("connected, no handshake", "ws tls wss", 2, TCP, b"", MESSAGE),
    ("half of a handshake", "tls wss", 2, HALF, b"", MESSAGE),
    ("a ClientHello without end", "tls wss", 1, TCP, HELLO, "OpenSSL, 131 kB"),
    ("TLS, but no HTTP", "wss", 1, TLS, b"", MESSAGE),
    ("a request without end", "ws wss", 1, TLS, ENDLESS, HEAD),
    ("100 header fields", "ws wss", 1, TLS, FIELDS, HEAD),
    ("open, silent", "ws tls wss", 1, OPEN, b"", LIFETIME),
    ("a head without end", "sip", 1, OPEN, SIP_HEAD, SIZE),
    ("a record without its last byte", "tls", 1, OPEN, CUT, ONE),
    ("a message without its last byte", "line sip ws wss", 1, OPEN, CUT, SIZE),
    ("a message in tiny frames", "ws wss", 0.02, OPEN, b"\2" + TINY, SIZE),
    ("a text in tiny frames", "ws", 0.02, OPEN, b"\1" + TINY, SIZE),
    ("does not read our answers", ALL, 0.1, OPEN, ask(b"fill"), QUEUE),
    ("has read 1 MB", "tls wss", 0.2, OPEN, ask(b"read"), ONE),
    ("lingers", ALL, 1, OPEN, ask(b"quit"), "`linger`, 2 s"),
    ("ended in a handshake", "ws tls wss", 1, TCP, bytes(99), NOTHING),
    ("ended in a message", "line sip ws tls wss", 0.5, OPEN, CUT, NOTHING),
    ("ended with a full queue", ALL, 0.1, OPEN, ask(b"fill"), NOTHING)]


def bring(port, proto, stage, far, data):
    """Bring a connection to a stage; return its socket, the peer's."""
    sock = socket.create_connection(("127.0.0.1", port), 20)
    if proto in ("tls", "wss") and far >= HALF:
        sock = CLIENT.wrap_socket(sock, server_hostname="localhost",
                                  do_handshake_on_connect=far > HALF)
    if far == HALF:
        sock.setblocking(False)
        with contextlib.suppress(ssl.SSLWantReadError):
            sock.do_handshake()
    if proto in ("ws", "wss") and far == OPEN:
        sock.sendall(REQUEST + b"\r\n")
        assert b" 101 " in sock.recv(1000)
    data = data[proto] if isinstance(data, dict) else data
    (socket.socket if data is RECORD else type(sock)).sendall(sock, data)
    if stage == "has read 1 MB":
        sock.makefile("rb").read(1 << 20)
    if "ended" in stage:
        sock.close()
    return sock


def serve(proto, ended, pipe):
    """The server.  Sends its port, and after each batch the kB it holds."""
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    LIBC.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size
    ops, ends = tcpops.TcpOps(clock=lambda: time.monotonic() / 10), bytearray()
    ops.event_route("tcp:closed")(lambda event: ends.append(0))

    @ops.request_route
    def on_message(msg):
        word = msg.data[-4:]
        while msg.reply(ANSWERS.get(word, b"")) and word == b"fill":
            pass
        if word == b"quit":
            ops.tcp_close_connection()
    listener = ops.listen(
        "127.0.0.1", 0, tls=SERVER if proto in ("tls", "wss") else None,
        framing={"tls": "raw", "wss": "ws"}.get(proto, proto))
    # Room that is free in the heap would take in a part of what is measured.
    fill = [bytes(size) for size in range(0, 480, 16) for _ in range(2000)]
    gc.collect(), gc.disable()
    pipe.send(ops.connection(listener).Rp)
    wanted = 0
    while fill:
        while not pipe.poll():
            ops.step(0.005)
        wanted, late = wanted + pipe.recv() * ended, time.monotonic() + 10
        while ops.step(0 if ended else 0.01) or len(ends) != wanted:
            if time.monotonic() > late:
                sys.exit(f"{len(ends)} connections have ended, not {wanted}")
        LIBC.malloc_trim(0)
        pages = Path("/proc/self/smaps_rollup").read_text()  # exact
        pipe.send(1.024 * int(pages.split("Anonymous:")[1].split()[0]))


def measure(proto, count, stage, *how):
    """Return the kB that a connection at a stage makes a server hold."""
    (ours, theirs), ended, socks, held = FORK.Pipe(), "ended" in stage, [], []
    server = FORK.Process(target=serve, args=(proto, ended, theirs))
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        server.start(), theirs.close()  # within fork() it would be lost
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        port = ours.recv()
        for part in ((count + 1) // 2, count):
            for size in [1] * part if ended else [part]:
                socks += [bring(port, proto, stage, *how) for _ in range(size)]
                ours.send(size)
                now = ours.recv()
            held.append(now)
        return max(0, held[1] - held[0]) / count
    except (EOFError, OSError) as error:  # the server may have said why
        sys.exit(f"hostile.py: {proto}, {stage}: {error!r}")
    finally:
        server.kill()
        [sock.close() for sock in socks]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--connections", metavar="N", type=int, default=100, help="1 to 100")
    add("--only", metavar="WORD", help="a protocol, or a word of a stage")
    add("--markdown", action="store_true", help="print README.md's table")
    parser.error = lambda text: parser.exit(2, f"hostile.py: {text}\n")
    options = parser.parse_args()
    if not 1 <= options.connections <= 100:  # of some stages, more
        parser.error("--connections must be 1 to 100")
    wanted = [[proto for proto in protos.split() if options.only in (
        None, proto, *stage.replace(",", "").split())]
        for stage, protos, *_ in STAGES]
    if not any(wanted):
        parser.error(f"no protocol, and in no stage: {options.only}")
    if options.markdown:
        print("| stage |", " | ".join(ALL.split()), "| connections | bounded"
              " by |\n" + "| --- " * 9 + "|", flush=True)
    for (stage, _, share, *how, bound), protos in zip(STAGES, wanted):
        count, row = max(1, int(share * options.connections)), {}
        for proto in protos:
            row[proto] = f"{measure(proto, count, stage, *how):,.1f}"
            if not options.markdown:
                print(f"{proto:5} {stage:31} {row[proto]:>8} kB per connection"
                      f" of {count:3}; {bound.replace('`', '')}", flush=True)
        if options.markdown and row:
            cells = [stage, *(row.get(proto, "") for proto in ALL.split())]
            print("|", " | ".join(cells), f"| {count} | {bound} |", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    main()
