"""What tcpops costs, beside its peers, on this machine.

    python3 examples/bench.py --quick        under a minute
    python3 examples/bench.py                three minutes, as in README.md
    python3 examples/bench.py --only echo,memory --json

Peers are asyncio, and uvloop, Twisted and websockets where they are installed
(pip install uvloop twisted websockets).  Each server is a process of its own
on the first core, the load runs on the second.  What decides is the server's
processor time per message, as the kernel counts it: that holds even where the
load is the slower side.  Servers take turns, round by round, and each figure
is the median of its rounds, each ratio the median of the rounds' ratios: what
slows the machine for a while slows both sides.  "ok" and "MISS" say whether a
figure, or its ratio to a peer's, is within what we aim at.  Linux only.
"""

if __name__ == "__main__":
    import quiet  # before the rest: it may be interrupted there

import argparse
import asyncio
import contextlib
import ctypes
import gc
import itertools
import json
import operator
import os
import re
import resource
import select
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tcpops

CERTIFICATE = str(Path(__file__).with_name("localhost.pem"))
HOST = "127.0.0.1"
SOURCES = itertools.count()
MEGABYTE = bytes(1 << 20)
ASK = b"big!"       # asks for a megabyte
SIP_OPTIONS = (
    b"OPTIONS sip:alice@example.com SIP/2.0\r\n"
    b"Via: SIP/2.0/TCP 192.0.2.1:5060;branch=z9hG4bK776asdhds\r\n"
    b"Max-Forwards: 70\r\nFrom: Bob <sip:bob@example.com>;tag=456248\r\n"
    b"To: Alice <sip:alice@example.com>\r\nCall-ID: 843817637684230@998sdasdh09\r\n"
    b"CSeq: 1826 OPTIONS\r\nContent-Length: 0\r\n\r\n")

# -- the servers: bench.py --serve NAME ----------------------------------------
#
# All keep the same books: a number for each connection, the time of its last
# activity, and an idle lifetime that is checked.


def serve_tcpops(kind):
    """Ours, as the README has it."""
    ops = tcpops.TcpOps(connection_lifetime=3600, max_message=1 << 20,
                        max_write_buffer=1 << 22)

    @ops.request_route
    def on_message(msg):
        if msg.data == ASK:
            msg.reply(MEGABYTE)
        elif kind == "sip":
            msg.header("Via"), msg.header("CSeq")
            msg.reply(b"SIP/2.0 200 OK" + msg.data[37:])
        else:
            msg.reply(msg.payload if kind == "ws" else msg.data)

    @ops.event_route("tcp:opened")
    def on_opened(event):
        if kind == "hold":
            ops.tcp_set_connection_lifetime(3605)
            ops.tcp_keepalive_enable(60, 5, 5)

    @ops.event_route("tcp:closed")
    def on_closed(event):
        pass
    conid = ops.listen(HOST, 0, tls=server_context(kind), backlog=4096,
                       framing=kind if kind in ("sip", "ws") else "raw")
    announce(ops.connection(conid).Rp)
    ops.run()


class Keeper(asyncio.Protocol):
    """The same books in asyncio and uvloop."""

    count = 0
    __slots__ = ("conid", "transport", "active", "timer", "loop")

    def connection_made(self, transport):
        Keeper.count += 1
        self.conid = Keeper.count
        self.loop = asyncio.get_running_loop()
        self.transport = transport
        self.active = self.loop.time()
        self.timer = self.loop.call_later(3600, self.check)

    def check(self):
        due = self.active + 3600
        if due <= self.loop.time():
            self.transport.abort()
        else:
            self.timer = self.loop.call_at(due, self.check)

    def data_received(self, data):
        self.active = self.loop.time()
        self.transport.write(MEGABYTE if data == ASK else data)

    def connection_lost(self, reason):
        self.timer.cancel()


class HoldingKeeper(Keeper):
    """With the kernel's keepalive on."""

    __slots__ = ()

    def connection_made(self, transport):
        super().connection_made(transport)
        keepalive_on(transport.get_extra_info("socket"))


def keepalive_on(sock):
    for level, option, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)):
        sock.setsockopt(level, option, value)


def serve_asyncio(kind):
    async def main():
        protocol = HoldingKeeper if kind == "hold" else Keeper
        server = await asyncio.get_running_loop().create_server(
            protocol, HOST, 0, ssl=server_context(kind), backlog=4096)
        announce(server.sockets[0].getsockname()[1])
        await server.serve_forever()
    asyncio.run(main())


def serve_uvloop(kind):
    import uvloop
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    serve_asyncio(kind)


def serve_twisted(kind):
    from twisted.internet import protocol, reactor

    class Echo(protocol.Protocol):
        count = 0

        def connectionMade(self):
            Echo.count += 1
            self.conid = Echo.count
            self.active = reactor.seconds()
            self.timer = reactor.callLater(3600, self.check)
            if kind == "hold":
                keepalive_on(self.transport.getHandle())

        def check(self):
            self.transport.abortConnection()

        def dataReceived(self, data):
            self.active = reactor.seconds()
            self.transport.write(data)

        def connectionLost(self, reason):
            if self.timer.active():
                self.timer.cancel()
    factory = protocol.Factory.forProtocol(Echo)
    port = reactor.listenTCP(0, factory, backlog=4096, interface=HOST)
    announce(port.getHost().port)
    reactor.run()


def serve_bare(kind):
    """epoll and nothing else: no books, no limits, no queue."""
    server = socket.create_server((HOST, 0), backlog=4096)
    server.setblocking(False)
    poll = select.epoll()
    poll.register(server, select.EPOLLIN)
    socks = {}
    announce(server.getsockname()[1])
    while True:
        for number, _ in poll.poll():
            sock = socks.get(number)
            if sock is None:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sock, _ = server.accept()
                        sock.setblocking(False)
                        sock.setsockopt(socket.IPPROTO_TCP,
                                        socket.TCP_NODELAY, 1)
                        socks[sock.fileno()] = sock
                        poll.register(sock, select.EPOLLIN)
                continue
            data = sock.recv(65536)
            if data:
                sock.send(data)
            else:
                poll.unregister(sock)
                socks.pop(number).close()


def serve_websockets(kind):
    import websockets

    async def main():
        async def echo(sock):
            async for message in sock:
                await sock.send(message)
        async with websockets.serve(echo, HOST, 0, compression=None,
                                    ping_interval=None) as server:
            announce(server.sockets[0].getsockname()[1])
            await server.serve_forever()
    asyncio.run(main())


def server_context(kind):
    if kind != "tls":
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATE)
    return context


def announce(port):
    gc.collect()
    print(port, flush=True)


SERVERS = {name[6:]: function for name, function in globals().items()
           if name.startswith("serve_")}


def die_with_us():
    """In a child: have the kernel end it when its parent has ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


#: How a child is started, to which Ctrl-C says nothing.
ALONE = {"preexec_fn": die_with_us, "start_new_session": True}


class Server:
    """A server in a process of its own."""

    def __init__(self, name, kind="echo"):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name, "--kind", kind],
            stdout=subprocess.PIPE, text=True, **ALONE)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {name} server did not start")
        self.address = HOST, int(line)

    def cpu(self):
        """Return its processor seconds, as the scheduler counts them."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def memory(self):
        """Return its resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def installed(names):
    """Return those servers whose package is there."""
    modules = {"uvloop": "uvloop", "twisted": "twisted",
               "websockets": "websockets"}
    found = []
    for name in names:
        with contextlib.suppress(ImportError):
            __import__(modules.get(name, "os"))
            found.append(name)
    return found

# -- the load -------------------------------------------------------------------


def connect(address, count):
    """Connect from ever another address: the ports of one are used up soon."""
    socks = []
    for _ in range(count):
        source = f"127.1.{next(SOURCES) // 200 % 250}.1"
        sock = socket.socket()
        # Else bind() would look for a port that is free for every peer.
        sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
        sock.bind((source, 0))
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        socks.append(sock)
    return socks


def ping_pong(socks, message, answer, seconds):
    """Each sends, waits for its answer and sends again; return how many."""
    poll = select.epoll()
    by_number = {}
    for sock in socks:
        by_number[sock.fileno()] = sock.recv, sock.send
        poll.register(sock, select.EPOLLIN)
    for sock in socks:
        sock.send(message)
    count, end = 0, time.perf_counter() + seconds
    pending = dict.fromkeys(by_number, answer)
    going = True
    while pending:
        ready = poll.poll(5)
        if not ready:
            raise SystemExit("a server does not answer")
        going = going and time.perf_counter() < end
        for number, _ in ready:
            recv, send = by_number[number]
            left = pending[number] - len(recv(1 << 20))
            if left > 0:
                pending[number] = left
                continue
            count += 1
            if going:
                pending[number] = answer
                send(message)
            else:
                del pending[number]
    poll.close()
    return count


def web_handshake(socks):
    for sock in socks:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
                     b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                     b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += sock.recv(4096)


def web_frame(payload):
    mask = b"\1\2\3\4"
    return struct.pack("!BB", 0x82, 0x80 | len(payload)) + mask + bytes(
        byte ^ mask[n % 4] for n, byte in enumerate(payload))


class TlsLoad:
    """Sockets that encrypt; for ping_pong they look like plain ones."""

    context = None

    def __init__(self, sock):
        if TlsLoad.context is None:
            TlsLoad.context = ssl.create_default_context(cafile=CERTIFICATE)
        self.sock = TlsLoad.context.wrap_socket(
            sock, server_hostname="localhost")
        self.fileno, self.recv = self.sock.fileno, self.sock.recv
        self.send = self.sock.send

# -- what is measured -------------------------------------------------------------


class Bench:
    """Runs what was asked for, and collects rows."""

    def __init__(self, options):
        self.rounds = 5 if options.quick else 21
        self.seconds = 0.1 if options.quick else 0.3
        self.scale = 0.2 if options.quick else 1
        self.quiet = options.json
        self.rows = []

    def progress(self, text):
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def add(self, what, figures, unit, *targets, note=""):
        """Note a row: {server: its figures}, and targets (peer, limit).

        The limit is one of ours by the peer's, or of ours alone where the
        peer is None.
        """
        row = {"what": what, "unit": unit, "note": note, "targets": [],
               "figures": {name: statistics.median(rounds)
                           for name, rounds in figures.items()}}
        for peer, limit in targets:
            if peer is None or peer in figures:
                value = statistics.median(map(
                    operator.truediv, figures["tcpops"],
                    figures.get(peer) or itertools.repeat(1)))
                row["targets"].append({"peer": peer, "value": round(value, 3),
                                       "limit": limit, "met": value <= limit})
        self.rows.append(row)
        self.progress("")
        if not self.quiet:
            show(row)

    def alternate(self, what, names, kind, count, prepare, play):
        """Have servers take turns; return their rounds, {name: [figure]}, by
        processor time and by throughput.
        """
        servers, cpu, speed = {}, {}, {}
        try:
            for name in names:
                self.progress(f"{what}: starting {name}")
                server = servers[name] = Server(name, kind)
                server.socks = prepare(connect(server.address, count))
                play(server.socks, 0.1)
                cpu[name], speed[name] = [], []
            for turn in range(self.rounds):
                for name in names if turn % 2 else reversed(names):
                    self.progress(f"{what}: round {turn + 1} of {self.rounds},"
                                  f" {name}")
                    server = servers[name]
                    used, start = server.cpu(), time.perf_counter()
                    done = play(server.socks, self.seconds)
                    spent = time.perf_counter() - start
                    cpu[name].append((server.cpu() - used) / done * 1e6)
                    speed[name].append(done / spent)
        finally:
            for server in servers.values():
                server.end()
        return cpu, speed

    def echo(self, count=100, names=("tcpops", "uvloop", "asyncio", "bare",
                                     "twisted"), targets=()):
        cpu, speed = self.alternate(
            f"echo, {count} connections", installed(names), "echo", count,
            list, lambda socks, seconds: ping_pong(
                socks, b"x" * 64, 64, seconds))
        self.add(f"echo, {count} connections, 64 bytes", cpu,
                 "µs of processor per message", *targets,
                 note=rates(speed))

    def run_echo(self):
        self.echo(100, targets=(("uvloop", 1.15), ("asyncio", 0.35),
                                ("bare", 1.25)))

    def run_echo1000(self):
        self.echo(1000, ("tcpops", "uvloop"), (("uvloop", 1.2),))

    def run_idle(self):
        """100 that talk among many that do not."""
        many = int(10000 * self.scale)
        idle = []

        def prepare(socks):
            if not idle:  # the first server only: it is the one with them
                idle.extend(connect(socks[0].getpeername(), many))
            return socks
        SERVERS["alone"] = SERVERS["tcpops"]
        cpu, speed = self.alternate(
            f"100 among {many} idle", ["tcpops", "alone"], "echo", 100,
            prepare, lambda socks, seconds: ping_pong(
                socks, b"x" * 64, 64, seconds))
        for sock in idle:
            sock.close()
        self.add(f"echo, 100 connections among {many} idle ones", cpu,
                 "µs of processor per message", ("alone", 1.1),
                 note=rates(speed))

    def run_large(self):
        cpu, speed = self.alternate(
            "1 MB writes", installed(("tcpops", "asyncio", "uvloop")), "echo",
            4, list, lambda socks, seconds: ping_pong(
                socks, ASK, len(MEGABYTE), seconds))
        self.add("1 MB written to a reading peer", cpu,
                 "µs of processor per MB", ("asyncio", 1.0),
                 note=rates(speed, "MB"))

    def run_churn(self):
        """Connect, one echo, close, event."""
        def play(socks, seconds):
            address = socks[0].getpeername()
            count, end = 0, time.perf_counter() + seconds
            while time.perf_counter() < end:
                batch = connect(address, 20)
                for sock in batch:
                    sock.send(b"x" * 64)
                for sock in batch:
                    sock.recv(64)
                    sock.close()
                count += 20
            return count
        cpu, speed = self.alternate(
            "connect, echo, close", installed(("tcpops", "asyncio",
                                               "uvloop")),
            "echo", 1, list, play)
        self.add("connect, one echo, close, event", cpu,
                 "µs of processor per connection", ("asyncio", 1.0),
                 ("uvloop", 1.0), note=rates(speed))

    def run_memory(self):
        held, figures = int(8000 * max(self.scale, 0.5)), {}
        for name in installed(("tcpops", "asyncio", "uvloop", "twisted")):
            self.progress(f"memory: {name}")
            server = Server(name, "hold")
            try:
                warm = connect(server.address, 50)
                ping_pong(warm, b"x" * 64, 64, 0)
                before = server.memory()
                socks = connect(server.address, held)
                ping_pong(socks[-100:], b"x" * 64, 64, 0)
                settle(server)
                figures[name] = [(server.memory() - before) / held]
                for sock in socks + warm:
                    sock.close()
            finally:
                server.end()
        self.add(f"memory of a held connection ({held} held, with lifetime"
                 " and keepalive)", figures, "bytes", (None, 900))

    def run_tls(self):
        cpu, speed = self.alternate(
            "TLS echo", ["tcpops", "asyncio"], "tls", 50,
            lambda socks: [TlsLoad(sock) for sock in socks],
            lambda socks, seconds: ping_pong(socks, b"x" * 64, 64, seconds))
        self.add("TLS echo, 50 connections, 64 bytes", cpu,
                 "µs of processor per message", ("asyncio", 1.0),
                 note=rates(speed))

    def run_websocket(self):
        message = web_frame(b"x" * 64)

        def prepare(socks):
            web_handshake(socks)
            return socks
        cpu, speed = self.alternate(
            "WebSocket echo", installed(("tcpops", "websockets")), "ws", 100,
            prepare, lambda socks, seconds: ping_pong(
                socks, message, 66, seconds))
        self.add("WebSocket echo, 100 connections, 64 bytes", cpu,
                 "µs of processor per message", ("websockets", 1.0),
                 note=rates(speed))

    def run_sip(self):
        answer = len(SIP_OPTIONS) - 37 + 14
        cpu, speed = self.alternate(
            "SIP OPTIONS", ["tcpops"], "sip", 100, list,
            lambda socks, seconds: ping_pong(
                socks, SIP_OPTIONS, answer, seconds))
        self.add(f"SIP OPTIONS of {len(SIP_OPTIONS)} bytes, 100 connections",
                 cpu, "µs of processor per message", note=rates(speed))

    # -- in this process ------------------------------------------------------

    def run_state(self):
        """tcp_conid_state beside the two system calls that it must make."""
        with tcpops.TcpOps() as ops:
            left, right = socket.socketpair(socket.AF_UNIX)
            left.close(), right.close()
            server = socket.create_server((HOST, 0))
            left = socket.create_connection(server.getsockname())
            right, _ = server.accept()
            conid = ops.attach(right)
            while ops.step(0):
                pass

            def bare():
                right.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                try:
                    right.recv(1, socket.MSG_PEEK)
                except BlockingIOError:
                    pass
            figures = self.loops({"tcpops": lambda: ops.tcp_conid_state(
                conid), "bare": bare}, 20000)
            left.close(), server.close()
        self.add("tcp_conid_state of a quiet connection", figures,
                 "µs per call", ("bare", 1.5))

    def run_lifetime(self):
        figures = {}
        for count in (100, 100000):
            ops = simulated(count)
            number = iter(range(10 ** 9))
            figures[f"{count} connections"] = self.loops({
                "": lambda: ops.tcp_set_connection_lifetime(
                    2 + next(number) * 7919 % count, 3600)}, 50000)[""]
            del ops
        figures["tcpops"] = figures["100000 connections"]
        self.add("tcp_set_connection_lifetime", figures, "µs per call",
                 (None, 1.5), ("100 connections", 1.15))

    def run_deadlines(self):
        """A heap of a million, which descriptors would not allow."""
        count = int(1000000 * self.scale)
        before = memory_here()
        ops = simulated(count)
        deadlines = ops._deadlines
        self.progress(f"a heap of {count} deadlines")
        entries = (len(deadlines) * (sys.getsizeof((1.0, 2, 3))
                                     + sys.getsizeof(1.0) + 8)) / count
        number = iter(range(10 ** 9))
        figures = self.loops({
            "tcpops": lambda: ops.tcp_set_connection_lifetime(
                1 + next(number) * 7919 % count, 3600),
            "shortened": lambda: ops.tcp_set_connection_lifetime(
                1 + next(number) * 7919 % count,
                3500 - next(number) * 1e-3)}, 50000)
        self.add(f"a re-arm among {count} deadlines", figures, "µs per call",
                 (None, 2.0),
                 note=f"{entries:.0f} bytes a deadline, and"
                 f" {(memory_here() - before) / count - entries:.0f} its"
                 " connection's record and books")

    def loops(self, functions, count):
        """Return {name: [µs per call]}, of alternate rounds."""
        found = {name: [] for name in functions}
        count = int(count * self.scale)
        for _ in range(self.rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                for _ in range(count):
                    function()
                found[name].append(
                    (time.perf_counter() - start) / count * 1e6)
        return found

    def run_expiry(self):
        """10,000 lifetimes that end within 100 ms, beside an echo."""
        count = int(10000 * self.scale)
        self.progress(f"{count} lifetimes that expire at once")
        code = EXPIRY.format(path=str(Path(tcpops.__file__).parent))
        with subprocess.Popen([sys.executable, "-c", code], text=True,
                              stdout=subprocess.PIPE, **ALONE) as process:
            address = HOST, int(process.stdout.readline())
            socks = connect(address, count)
            sock, = connect(address, 1)
            worst, start = 0, time.perf_counter()
            sock.send(b"start %d" % count)
            sock.recv(64)
            while True:
                sent = time.perf_counter()
                sock.send(b"ping")
                answer = sock.recv(64)
                worst = max(worst, time.perf_counter() - sent)
                if answer != b"ping" or sent > start + 30:
                    break
            first, last = map(float, answer.split())
            process.kill()
        for sock in [*socks, sock]:
            sock.close()
        self.add(f"{count} lifetimes that expire within 100 ms",
                 {"tcpops": [last * 1000]}, "ms until the last was told",
                 (None, 500))
        self.add("the worst stall of an echo meanwhile",
                 {"tcpops": [worst * 1000]}, "ms", (None, 20))

    def run_start(self):
        """The command beside a program that only imports what it needs."""
        source = Path(tcpops.__file__).read_text(encoding="utf-8")
        imports = ", ".join(re.findall(r"^(?:import|from) (\w+)", source, re.M))
        found = {"tcpops": [], "as a script": [], "imports": []}
        with tempfile.TemporaryDirectory() as cache:
            for _ in range(self.rounds):
                for name, *command in (
                        ("tcpops", "-m", "tcpops", "--version"),
                        ("as a script", tcpops.__file__, "--version"),
                        ("imports", "-c", f"import {imports}")):
                    start = time.perf_counter()
                    subprocess.run(
                        [sys.executable, *command], check=True,
                        stdout=subprocess.DEVNULL,
                        cwd=Path(tcpops.__file__).parent,
                        env={**os.environ, "PYTHONPYCACHEPREFIX": cache,
                             "PYTHONDONTWRITEBYTECODE": ""})
                    found[name].append((time.perf_counter() - start) * 1000)
        self.add("python3 -m tcpops --version", found, "ms", ("imports", 1.3),
                 note="as a script: python3 tcpops.py, which Python compiles"
                 " anew each time")


EXPIRY = """
import sys, time
sys.path.insert(0, {path!r})
import tcpops
ops = tcpops.TcpOps(connection_lifetime=3600)
told = []

@ops.request_route
def on_message(msg):
    if msg.data.startswith(b"start"):
        global count, due
        count = int(msg.data.split()[1])
        now = time.monotonic()
        due = now + 1.1
        for info in ops.connections():
            if info.conid != msg.conid:
                lifetime = 1 + info.conid % 100 / 1000
                ops.tcp_set_connection_lifetime(info.conid, lifetime)
    if len(told) == count:
        msg.reply(b"%.6f %.6f" % (told[0] - due, told[-1] - due))
        told.append(0)
    else:
        msg.reply(msg.data)

@ops.event_route("tcp:timeout")
def on_end(event):
    told.append(time.monotonic())

print(ops.connection(ops.listen("127.0.0.1", 0, backlog=4096)).Rp, flush=True)
ops.run()
"""


class NoSocket:
    """What a simulated connection has for a socket."""

    def close(self):
        """Close nothing: a child does, after fork()."""


def simulated(count):
    """Return a TcpOps with connections that have no socket."""
    ops = tcpops.TcpOps(connection_lifetime=3600)
    sock, phase = NoSocket(), tcpops.Phase.OPEN
    stack = tcpops.Stack.of("raw")
    now = time.monotonic()
    for number in range(count + 2):
        conn = ops._begin(sock, phase, "accept", stack, None,
                          ("127.0.0.1", number))
        conn.active = now
        ops._arm(conn, now + 3600)
    return ops


def memory_here():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def settle(server):
    """Wait until a server does nothing any more."""
    before = -1
    while server.cpu() - before > 0.001:
        before = server.cpu()
        time.sleep(0.1)


def rates(speed, unit=""):
    return "per second: " + ", ".join(
        f"{name} {statistics.median(rounds):,.0f}{' ' + unit if unit else ''}"
        for name, rounds in speed.items())


def show(row):
    """Print a row for a person."""
    print(f"{row['what']} ({row['unit']})")
    print("    " + ", ".join(f"{name} {value:.2f}" if value < 100 else
                             f"{name} {value:.0f}"
                             for name, value in row["figures"].items()))
    for target in row["targets"]:
        word = "ok  " if target["met"] else "MISS"
        of = f" of {target['peer']}" if target["peer"] else ""
        print(f"    {word} {target['value']:.2f}{of},"
              f" at most {target['limit']}")
    if row["note"]:
        print("    " + row["note"])
    print(end="", flush=True)


def main():
    names = [name[4:] for name in vars(Bench) if name.startswith("run_")]
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Benchmarks: " + ", ".join(names))
    parser.add_argument("--quick", action="store_true",
                        help="fewer, shorter rounds")
    parser.add_argument("--only", metavar="NAME,NAME",
                        help="some of the benchmarks")
    parser.add_argument("--json", action="store_true",
                        help="one JSON document instead of text")
    parser.add_argument("--serve", choices=SERVERS | {"alone": None},
                        help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="echo", help=argparse.SUPPRESS)
    parser.error = lambda text: parser.exit(2, f"bench.py: {text}\n")
    options = parser.parse_args()
    if not hasattr(os, "sched_getaffinity"):
        parser.error("this Python binds no process to a core, as CPython does")
    cores = sorted(os.sched_getaffinity(0))
    if options.serve:
        os.sched_setaffinity(0, cores[:1])
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        SERVERS.get(options.serve, serve_tcpops)(options.kind)
        return
    wanted = names if options.only is None else [
        name.strip() for name in options.only.split(",")]
    for name in wanted:
        if name not in names:
            parser.error(f"--only knows {', '.join(names)}, not {name!r}")
    os.sched_setaffinity(0, cores[-1:])
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    bench = Bench(options)
    missing = [name for name in ("uvloop", "twisted", "websockets")
               if not installed([name])]
    if missing:
        print(f"not installed, so left out: {', '.join(missing)}",
              file=sys.stderr)
    if len(cores) < 2:
        print("only one core: server and load share it", file=sys.stderr)
    for name in wanted:
        getattr(bench, "run_" + name)()
    if options.json:
        print(json.dumps({
            "python": sys.version.split()[0], "tcpops": tcpops.__version__,
            "rows": bench.rows}, indent=1))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
