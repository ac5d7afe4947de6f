"""The checks of exercises.py, one for each exercise.

A check takes the object that an answer defines, uses it in several worlds, and
raises Wrong with the words for what happened in the first that goes wrong.
"""

import contextlib
import itertools
import logging
import os
import random
import re
import socket
import struct
import threading
import time

import tcpops
from vanish import vanish, wait

TICK = 0.25  #: seconds by which a check moves the clock of a loop
WORLDS = []  #: the words for those of the check that runs; the last is now


class Wrong(Exception):
    """An answer is wrong; the text says what happened."""


class Log(logging.Handler):
    """Keeps the lines that tcpops logs, and what the handlers raised."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines, self.raised = [], []

    def emit(self, record):
        if record.exc_info:
            self.raised.append(record.exc_info[1])
        else:
            self.lines.append(record.getMessage())

    def check(self):
        """Raise what a handler of the answer's has raised, if any has."""
        if self.raised:
            raise self.raised[0]


LOG = Log()


@contextlib.contextmanager
def world(words):
    """A world of a check, by what is the case in it."""
    WORLDS.append(words)
    yield
    LOG.check()


def demand(holds, text):
    """Raise Wrong with this text unless something holds."""
    if not holds:
        LOG.check()
        raise Wrong(text)


class Peer:
    """The other end of a connection: the bytes that it got, and its end."""

    def __init__(self, sock):
        self.sock = sock
        self.name = "%s:%d" % sock.getsockname()
        self.heard = b""
        self.end = None  #: "FIN" or "RST", once that has come
        sock.setblocking(False)

    def say(self, data):
        """Send what the kernel takes at once; return how much that is."""
        try:
            return self.sock.send(data)
        except OSError:
            return 0

    def look(self):
        """Take what has come; return itself."""
        try:
            while self.end is None:
                data = self.sock.recv(65536)
                self.heard += data
                self.end = None if data else "FIN"
        except BlockingIOError:
            pass
        except OSError:
            self.end = "RST"
        return self

    def reset(self):
        """Close with an RST, as one does that may linger for 0 s."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                             struct.pack("ii", 1, 0))
        self.sock.close()


class Server:
    """A TcpOps that an answer prepares, and that a check turns."""

    def __init__(self, prepare, *arguments, framing="raw", moved=False, **how):
        self.now = 0.0  #: of the clock, if the check moves it
        clock = (lambda: self.now) if moved else time.monotonic
        self.ops = tcpops.TcpOps(clock=clock, linger=0.1, **how)
        self.result = prepare(self.ops, *arguments)
        self.port = self.listen(framing)

    def listen(self, framing):
        """Listen on one more port; return it."""
        listener = self.ops.listen("127.0.0.1", 0, framing=framing)
        return self.ops.connection(listener).Rp

    def client(self, port=None, small=False):
        """Return a Peer that is accepted.  While a small one does not read,
        the kernel soon takes no more for it.
        """
        sock = socket.socket()
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        sock.connect(("127.0.0.1", port or self.port))
        peer = Peer(sock)
        self.until(lambda: self.conid(peer) > 0 or peer.look().end)
        return peer

    def conid(self, peer):
        """Return the conid of a peer's connection, -1 if it has ended."""
        return self.ops.tcp_get_conid(peer.name)

    def until(self, condition, patience=3):
        """Turn the loop until a condition holds; return whether it does."""
        end = time.monotonic() + patience
        while not condition() and time.monotonic() < end:
            self.ops.step(0.01)
            LOG.check()
        return condition()

    def settle(self):
        """Turn the loop until nothing is left to do, a while at the most."""
        for _ in range(100):
            if not self.ops.step(0):
                break
            LOG.check()

    def read_all(self, peer):
        """Have a peer read until nothing is left to come."""
        def quiet():
            count, info = len(peer.heard), self.ops.connection(
                self.conid(peer))
            return (not self.ops.step(0.02) and len(peer.look().heard) == count
                    and not (info and info.queued))
        self.until(quiet)

    def play(self, scripts, patience):
        """Move the clock on, and have clients send by scripts.

        A script is a list of (time, data).  Returns {name of the script: the
        time after which the client was closed, None if it is open}.
        """
        start, closed = self.now, dict.fromkeys(scripts)
        peers = {name: self.client() for name in scripts}
        while self.now < start + patience:
            for name, peer in peers.items():
                for due, data in scripts[name]:
                    if due == self.now - start:
                        peer.say(data)
            self.settle()
            self.now += TICK
            self.settle()
            for name, peer in peers.items():
                if closed[name] is None and peer.look().end:
                    closed[name] = self.now - start
        return closed


def pair():
    """Return both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        return sock, server.accept()[0]


def demand_closed(what, after, due):
    """Raise Wrong unless a connection was closed when due (None: not)."""
    holds = (after is due if None in (after, due)
             else abs(after - due) <= TICK)
    closed = "not closed" if after is None else f"closed after {after:g} s"
    demand(holds, f"{what} was {closed}; "
           + ("it may stay" if due is None else f"{due} s is right"))


def brief(data):
    """Return the words for a message."""
    text = "nothing" if data is None else repr(data)
    return text if len(text) < 30 else f"{text[:20]}... ({len(data)} bytes)"

# -- tcpops, with a clock that is moved ---------------------------------------


def lifetimes(answer):
    for silent, known in ((5, 60), (40, 7), (random.randint(8, 20),
                                             random.randint(25, 50))):
        with world(f"lifetimes(ops, {silent}, {known})"):
            server = Server(answer, silent, known, moved=True)
            for scripts in (
                    {"that said nothing": [],
                     "that sent a message after 2 s": [(2, b"hello")],
                     "that sent messages after 2 s and 6 s":
                         [(2, b"hello"), (6, b"again")]},
                    {"that said nothing, after others had spoken": []}):
                closed = server.play(scripts, 70)
                for what, script in scripts.items():
                    due = script[-1][0] + known if script else silent
                    demand_closed(f"a client {what}", closed[what], due)


def bound(answer):
    for limit in (4, 9, random.randint(5, 8)):
        with world(f"bound(ops, {limit})"):
            server = Server(answer, limit, framing="line", moved=True)
            drip = [(due, b"x") for due in range(4 * limit)]
            lines = [(limit * turn + late, data) for turn in range(4)
                     for late, data in ((0, b"hel"), (limit - 1, b"lo\n"))]
            for what, after in server.play({
                    "a client that sends one byte a second": drip,
                    "a client that does, behind a line":
                        [(0, b"hello\n"), *drip],
                    f"a client that takes {limit - 1} s for a line": lines,
                    f"a client that pauses for {2 * limit} s":
                        [(0, b"one\n"), (2 * limit, b"two\n")],
                    "a client that says nothing": []}, 4 * limit).items():
                drips = "second" in what or "does" in what
                demand_closed(what, after, limit if drips else None)

# -- sockets, and tcpops in real time -----------------------------------------


def server(answer):
    for count, end, asked in itertools.product(
            (random.randint(2, 50000), 0), ("FIN", "RST"), (0, 1, 3)):
        sent = f"{end} behind {count:,} bytes" if count else end
        with world(f"the peer sends {sent}, then we call"
                   f" {'alive(), ' * asked}serve()"):
            sock, other = pair()
            tested, peer, data = answer(sock), Peer(other), os.urandom(count)
            demand(tested.alive() is True,
                   "alive() was not True before the peer had sent anything")
            peer.say(data)
            if end == "RST":
                peer.reset()
            else:
                other.close()
            wait(sock, 0x2000)  # POLLRDHUP
            for _ in range(asked):
                alive = tested.alive()
                demand(alive is (end == "FIN"), f"your monitor was told"
                       f" {alive!r}; the peer had sent {sent}")
            received, how = tested.serve()
            demand(received == data, f"your server got {len(received):,}"
                   f" bytes; the peer had sent {count:,}")
            demand(how == {"FIN": "eof", "RST": "reset"}[end],
                   f"your server was told {how!r}; the peer had sent {sent}")


def watch(answer):
    limit, told = random.randint(2, 3), []
    with world(f"watch(ops, {limit}, gone), and five peers"):
        server = Server(answer, limit, told.append)
        peers = {what: server.client() for what in (
            "that vanished while idle", "that vanished with data in flight",
            "that is silent, but there", "that sent FIN", "that sent RST")}
        conids = {what: server.conid(peer) for what, peer in peers.items()}
        idle, flight, silent, fin, rst = peers
        for what in (idle, flight):
            vanish(peers[what].sock)
        server.ops.send(conids[flight], b"hello")
        peers[fin].sock.close()
        peers[rst].reset()
        server.until(lambda: False, limit + 1)
        for what, conid in conids.items():
            count, right = told.count(conid), int("vanished" in what)
            demand(count == right, f"calls of gone() within {limit + 1} s for"
                   f" the peer {what}: {count}; {right} is right")
        demand(set(told) <= {*conids.values()},
               f"gone() was called with {told}; the conids are {conids}")
        demand(server.conid(peers[silent]) > 0,
               f"the connection of the peer {silent} was ended")
    for limit in (2, random.randint(5, 99)):
        with world(f"watch(ops, {limit}, gone), and the keepalive that a"
                   " connection then has"):
            server = Server(answer, limit, print)
            peer = server.client()
            keepalive = server.ops.connection(server.conid(peer)).keepalive
            demand(keepalive, "you have set none")
            demand(keepalive.limit <= limit, "the keepalive that you set needs"
                   f" {keepalive.limit} s: {keepalive}")
    with world("watch(ops, 2, gone), and three peers that are there"):
        demand_kept(answer)


def demand_kept(answer):
    """Raise Wrong if gone() is called for peers that have not vanished."""
    told = []
    server = Server(answer, 2, told.append, connection_lifetime=0.6,
                    send_timeout=0.3, max_write_buffer=1 << 24)
    idle, deaf, closed = (server.client(small=True) for _ in range(3))
    conids = {server.conid(peer): what for peer, what in (
        (idle, "that was silent for a lifetime of 0.6 s"),
        (deaf, "that has read nothing for a send_timeout of 0.3 s"),
        (closed, "whose connection we have closed"))}
    server.ops.send(server.conid(deaf), bytes(1 << 23))
    server.ops.tcp_close_connection(server.conid(closed))
    server.until(lambda: told or not server.ops.connections(), 1.5)
    for conid in told[:1]:
        raise Wrong("gone() was called for a peer that is there: one"
                    f" {conids.get(conid, 'of another connection')}")


def rooms(answer):
    tea, coffee = (f"{word}{random.randint(10, 99)}"
                   for word in ("tea", "coffee"))
    server = Server(lambda ops: None)
    ports = {name: server.listen(answer([name])) for name in (tea, coffee)}
    for name, path, status in (
            (tea, f"/chat/{tea}", 101), (coffee, f"/chat/{coffee}", 101),
            (tea, f"/chat/{tea}?from=7", 101), (tea, f"/chat/{coffee}", 403),
            (coffee, f"/chat/{tea}", 403), (tea, f"/chat/{tea}pot", 403),
            (tea, f"/chat/{tea}/more", 403), (tea, "/chat/", 403),
            (tea, "/", 403), (tea, f"/old/chat/{tea}", 403),
            (tea, f"/chat/?/chat/{tea}", 403)):
        with world(f"rooms([{name!r}]), and a client asks for {path}"):
            client = server.client(ports[name])
            client.say(f"GET {path} HTTP/1.1\r\nHost: here\r\n"
                       "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                       "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                       "Sec-WebSocket-Version: 13\r\n\r\n".encode())
            server.until(lambda: client.look().heard)
            head, _, text = client.heard.decode().partition("\r\n\r\n")
            line = head.partition("\r\n")[0]
            demand(f" {status} " in line,
                   f"it was told {line!r}; {status} is right")
            demand(status == 101 or path in text,
                   f"the text of the 403 is {text.strip()!r}; the path is not"
                   " in it")


def prefixed(answer):
    payloads = [b"hello", b"", *(os.urandom(random.randint(1, 300))
                                 for _ in range(3)), bytes(1000)]
    data = b"".join(struct.pack("!I", len(payload)) + payload
                    for payload in payloads)
    got = []

    def prepare(ops):
        @ops.request_route
        def on_message(msg):
            got.append(msg.data)
            msg.reply(msg.data)
    server = Server(prepare, framing=answer, max_message=1000)
    for size in (1, random.randint(2, 9), 307, len(data)):
        with world(f"{len(payloads)} messages come, in pieces of {size}"):
            got.clear()
            client = server.client()
            for at in range(0, len(data), size):
                client.say(data[at:at + size])
                server.settle()
                if got != payloads[:len(got)]:
                    break
            server.until(lambda: len(got) >= len(payloads), 1)
            for number, (one, right) in enumerate(
                    itertools.zip_longest(got, payloads), 1):
                demand(one == right, f"message {number} was {brief(one)};"
                       f" {brief(right)} is right")
            demand(server.until(lambda: client.look().heard == data, 1),
                   "the same messages were sent back, but not the same bytes")
    for length in (1001, 2 ** 32 - 1):
        with world(f"a length of {length:,} comes; max_message is 1000"):
            client = server.client()
            client.say(struct.pack("!I", length))
            demand(server.until(lambda: client.look().end, 1),
                   "the connection is still open")
            before = server.ops.stats()["ended"]["protocol"]
            client.sock.close()
            demand(server.until(lambda: server.ops.stats()["ended"]["protocol"]
                                > before), "that was no ProtocolError")
    with world("a FIN comes amid a message"):
        got.clear()
        client = server.client()
        client.say(struct.pack("!I", 5) + b"hel")
        client.sock.close()
        server.until(lambda: server.ops.stats()["ended"]["eof"])
        demand(not got, f"{got[:1]} was taken for a message")


def answer_and_close(answer):
    for what, closes, reads in (
            ("sends more, reads to the end, and closes", True, True),
            ("keeps sending, reads to the end, and closes", True, True),
            ("reads to the end, and never closes", False, True),
            ("keeps sending, reads to the end, and never closes", False, True),
            ("reads nothing", False, False)):
        limit = 10 if closes else 1
        with world(f"a peer that {what}; seconds is {limit}"):
            sock, other = pair()
            peer, done = Peer(other), threading.Event()
            data = os.urandom(random.randint(800_000, 900_000) if reads
                              else 9_000_000)
            thread = threading.Thread(target=converse, daemon=True, args=(
                peer, done, "keeps" in what, closes, reads))
            peer.say(b"more")
            thread.start()
            start = time.monotonic()
            result = answer(sock, data, limit)
            took = time.monotonic() - start
            if closes:
                thread.join(3)
            done.set()
            thread.join()
            demand(not reads or peer.heard == data and peer.end == "FIN",
                   f"the peer got {len(peer.heard):,} of {len(data):,} bytes,"
                   f" then {peer.end or 'nothing more'}")
            drips = "; its peer drips" if "keeps" in what else ""
            demand(took < limit + 0.5, f"it returned after {took:.1f} s;"
                   f" {limit} s is right{drips}")
            demand(result is closes, f"it returned {result!r}")
            demand(sock.fileno() < 0, "the socket is not closed")


def converse(peer, done, talks, closes, reads):
    """Be the peer of answer_and_close, in a thread, until done."""
    done.wait(0.1)  # sock.close() has been called by then, if too early
    end = time.monotonic() + 4
    while (not done.wait(0.005) and not (closes and peer.end)
           and time.monotonic() < end):
        if talks:
            peer.say(b"more")
        if reads:
            peer.look()
    peer.sock.close()


class Forwarder(Server):
    """A Server, and the target that its answer forwards to."""

    def __init__(self, answer):
        self.target = socket.create_server(("127.0.0.1", 0), backlog=5)
        self.target.setblocking(False)
        super().__init__(answer, *self.target.getsockname(),
                         max_write_buffer=100_000)

    def ends(self):
        """Return a new client, and the peer that it is paired with."""
        client, found = self.client(), []

        def came():
            with contextlib.suppress(BlockingIOError):
                found.append(Peer(self.target.accept()[0]))
            return found
        demand(self.until(came), "a client has connected, but no connection"
               " has come to the target")
        return client, found[0]

    def demand_passing(self, sender, receiver, by):
        """Raise Wrong unless the receiver gets what the sender sends."""
        data, before = os.urandom(random.randint(1, 900)), len(receiver.heard)
        sender.say(data)
        self.until(lambda: receiver.look().heard[before:] == data, 1)
        got = receiver.heard[before:]
        demand(got == data,
               f"{brief(data)} was sent by {by}, and {brief(got)} arrived")

    def demand_end(self, peer, name):
        """Raise Wrong unless a peer's connection ends."""
        demand(self.until(lambda: peer.look().end),
               f"the connection of {name} is still open")


def forwarder(answer):
    server = Forwarder(answer)
    with world("three clients at once"):
        pairs = [server.ends() for _ in range(3)]
        for number in (0, 1, 2, 2, 1, 0):
            client, there = pairs[number]
            server.demand_passing(client, there, f"client {number + 1}")
            server.demand_passing(there, client,
                                  f"the target to client {number + 1}")
    with world("the target speaks first"):
        server.demand_passing(*server.ends()[::-1], "the target")
    for side, name, others in ((0, "the client", "the target"),
                               (1, "the target", "the client")):
        with world(f"{name} sends 50,000 bytes and FIN"):
            ends = server.ends()
            peer, other = ends[side], ends[1 - side]
            data = os.urandom(50000)
            peer.say(data)
            peer.sock.close()
            server.until(lambda: other.look().end)
            got = ("all 50,000" if other.heard == data else
                   f"{len(other.heard):,} of them")
            demand(other.heard == data and other.end,
                   f"{others} got {got}, then {other.end or 'no FIN'}")
        with world(f"{name} sends RST"):
            ends = server.ends()
            ends[side].reset()
            server.demand_end(ends[1 - side], others)
    with world("the target seldom reads, and the client sends on and on"):
        demand_no_hole(server, *server.ends())
    with world("no one listens at the target"):
        server.target.close()
        server.demand_end(server.client(), "the client")


def demand_no_hole(server, client, there):
    """Raise Wrong if bytes are left out when there is no room for them."""
    data, sent, looked = os.urandom(16_000_000), 0, 0
    while sent < len(data) and not client.look().end:
        sent += client.say(data[sent:sent + 65536])
        server.ops.step(0)
        if sent - looked > 6_000_000:
            looked = sent
            there.look()
    server.until(lambda: there.look().end)
    for at in range(0, len(there.heard), 1000):
        demand(data.startswith(there.heard[at:at + 1000], at),
               f"of {sent:,} bytes some {at:,} have arrived, and then others:"
               " the stream has a hole")
    server.demand_end(client, "the client")
    server.demand_end(there, "the target")


def feed(answer):
    for limit in (10_000, 40_000):
        count = random.randint(2500, 3000)
        with world(f"{count} lines, max_write_buffer is {limit:,}"):
            server = Server(answer, framing="line", max_write_buffer=limit)
            quick, slow, late, gone = (
                server.client(small=small) for small in (0, 1, 1, 0))

            def publish(number):
                server.result(b"%d " % number + b"x" * 150)
                server.ops.step(0)
                quick.look()
            for number in range(count):
                publish(number)
                if number == count // 4:
                    gone.reset()
                if number == count // 2:
                    server.read_all(late)
            for peer in (slow, late):
                server.read_all(peer)
            for number in range(count, count + 3):
                publish(number)
            for peer, what in (
                    (quick, "that reads"), (slow, "that does not read"),
                    (late, "that does not read, but once in the middle")):
                server.read_all(peer)
                demand_lines(peer.heard, count + 3, f"a client {what}")
                # The kernels may hold all that comes once one has read.
                demand(peer is not slow or b"lost" in peer.heard, f"a client"
                       f" {what} got all lines: they were held for it")


def demand_lines(heard, count, who):
    """Raise Wrong unless each line has come, or is counted as lost."""
    expected = 0
    for line in heard.split(b"\n")[:-1]:
        found = re.fullmatch(rb"(lost )?(\d+)( x+)?", line)
        demand(found, f"{who} got the line {brief(line)}")
        if found[1]:
            expected += int(found[2])
        else:
            demand(int(found[2]) == expected, f"{who} got line"
                   f" {int(found[2])}; line {expected}, or the number of lines"
                   " lost, was to come")
            expected += 1
    demand(expected == count, f"{who} was told of {expected} lines; there"
           f" were {count}")

# -- conformance --------------------------------------------------------------

#: Systems by their fault; None has none, and "late" is allowed to be that.
SYSTEMS = {
    None: "a system that does all of it",
    "late": "a system that does all of it, but takes its time",
    "state": "a system whose answer to a question for a state is always 1",
    "again": "a system whose second call returns 1, too",
    "asker": "a system that closes the connection of the client that asks",
    "silent": "a system that does not report the end",
    "twice": "a system that reports the end twice",
    "timeout": "a system that reports the end as tcp:timeout",
    "conid": "a system that reports the end with another conid",
}


def scenario(answer):
    import conformance
    tcpops.log.setLevel(logging.ERROR)  # the systems are not the answer's

    class Subject(conformance.Subject):
        """The system of conformance.py, with a fault."""

        def result(self, headers, message):
            if self.fault == "late" and headers.get("x-ask") == "event":
                time.sleep(0.05)
            return super().result(headers, message)

        def call(self, name, headers):
            closes = name == "tcp_close_connection"
            if self.fault == "asker" and closes:
                del headers["x-conid"]
            result = super().call(name, headers)
            fault = (self.fault == "again" and closes
                     or self.fault == "state" and name == "tcp_conid_state")
            return 1 if fault else result

        def note(self, route, event):
            if self.fault == "silent" and event.reason == "closed":
                return
            super().note("tcp:timeout" if self.fault == "timeout" else route,
                         event)
            if self.fault == "twice":
                super().note(route, event)
            elif self.fault == "conid":
                self.events[-1] = re.sub(" [0-9]+", " 1", self.events[-1], 1)
    systems = random.sample([*SYSTEMS.items()], len(SYSTEMS))
    for number, (fault, what) in enumerate(systems):
        with world(what):
            address = "127.0.0.1", conformance.free_port("127.0.0.1")
            subject = Subject("always", address[1], address[0])
            subject.fault, subject.ops.linger = fault, 0.1
            threading.Thread(target=subject.run, daemon=True).start()
            others = [socket.create_connection(address)  # they take conids
                      for _ in range(random.randint(1, 9))]
            system = conformance.System(address)
            lab = conformance.Lab(system, number, None)
            result, right = answer(lab), fault in (None, "late")
            demand(result is right, f"your scenario returned {result!r};"
                   f" {right} is right")
            lab.end()
            system.end()
            for sock in others:
                sock.close()
