"""The hostile peers of storm.py, and the operations that make them."""

import base64
import contextlib
import ctypes
import functools
import hashlib
import itertools
import random
import re
import socket
import ssl
import struct
import types

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = termios = None

TCP, ANY = socket.IPPROTO_TCP, socket.SOL_SOCKET
NOSIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
VERSIONS = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
#: tcpops, or the copy that --file names; a datagram socket connected to
#: itself; contexts by (is a client's, version); what storm.test stands for.
env = types.SimpleNamespace(tcpops=None, canary=None, tls={}, hosts=[])
JUMPS = [0.25, 1, 1, 2, 3, 5, 10, 20, 60, 121, 4000]  #: seconds
NEVER = float("inf")
PONG = object()  #: instead of a message's payload
tick = itertools.count(1).__next__  #: what happens later has more of it


def kernel_count(sock, what):
    """Return how many bytes are unread, or sent and not acknowledged."""
    if fcntl is None or sock.fileno() < 0:
        return 0
    request = termios.FIONREAD if what == "unread" else termios.TIOCOUTQ
    with contextlib.suppress(OSError):
        return struct.unpack("i", fcntl.ioctl(sock, request, bytes(4)))[0]
    return 0


def barrier():
    """Return when what was sent on the loopback has arrived."""
    env.canary.send(b"")
    env.canary.recv(1)


def attach_filter(sock, on):
    """Have the kernel drop whatever comes in for a socket, or let it in."""
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    sock.setsockopt(ANY, 26 if on else 27, struct.pack(  # SO_ATTACH_FILTER
        "HP", 1, ctypes.addressof(drop)) if on else 0)   # SO_DETACH_FILTER


def frame(opcode, payload, masked, final=True):
    """Return a WebSocket frame; its mask is zero, and changes nothing."""
    size = len(payload)
    head = bytes([opcode | final << 7, masked << 7 | min(size, 126 + (
        size > 65535))]) + (b"" if size < 126 else size.to_bytes(
            2 if size < 65536 else 8, "big"))
    return head + bytes(4 * masked) + payload


def pinging(world, name, **pings):
    """Return a framing that has pings, and tells the world of each."""
    def ping(framing):
        world.on_ping(framing)
        base.ping(framing)
    base = env.tcpops.FRAMINGS[name]
    offers = {"offers": ("sip",)} if name == "ws" else {}
    return type(name, (base,), {"ping": ping, **pings, **offers})


class Peer:
    """The other end of one connection: what it did, said and read."""

    def __init__(self, number, sock, addresses, framing, client, context, r,
                 world):
        self.world = world
        self.number, self.sock, self.addresses = number, sock, addresses
        self.framing, self.client, self.r = framing, client, r
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context and context.wrap_bio(
            self.incoming, self.outgoing, server_side=not client)
        self.acts = set()      # what it has done that may end the connection
        self.shaken = not context
        self.ready = framing != "ws" and not context
        self.wire, self.wired = bytearray(), 0  # to send, and what was sent
        self.held = []         # (data, payload) until it is ready
        self.marks = []        # (where on the wire it ends, payload)
        self.rest = None       # what is left of a message: see say
        self.sip = framing == "sip" or framing == "ws" and r.random() < 0.5
        self.owes, self.due = 0, 0.0  # so many pongs, and when
        self.delay = r.choice([0, 0, 0, 0, 1, 10, NEVER])  # of its pongs
        self.answers = r.choice(["whole"] * 4 + ["half", "other"])
        self.pongs = []        # where on the wire each ends
        self.times = []        # (bytes sent until then, when)
        self.arrived = 0       # bytes in our kernel when the turn began
        self.spoiled = None    # so many messages are good
        self.news, self.read, self.end = bytearray(), 0, ""
        self.upgraded = False  # the head before its frames is read
        self.tail = b""        # the last plain bytes that it has read
        self.reads, self.drip, self.chats = "all", None, 0
        self.broken = False
        self.polite = r.random() < 0.7  # answers a FIN with a FIN
        self.fin = self.rst = None      # when
        self.floor = 0         # bytes that our kernel had before an RST
        self.serial = 0
        sock.setblocking(False)
        sock.setsockopt(TCP, socket.TCP_NODELAY, 1)
        if client:
            self.shake()

    def shake(self, data=b""):
        """Go on with the handshakes, after bytes from the other side."""
        if self.tls:
            self.incoming.write(data)
            data = b""
            try:
                if not self.shaken:
                    self.tls.do_handshake()
                    self.shaken = True
                    self.ready = self.framing != "ws"
                while chunk := self.tls.read(65536):
                    data += chunk
                self.acts.add("heard close_notify")
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                self.acts.add("heard close_notify")
            except (ssl.SSLError, ValueError):  # ours goes on all the same
                self.acts.add("alert")
            self.wire += self.outgoing.read()
        self.tail = (self.tail + data)[-8:]
        self.news += data if self.framing in ("sip", "ws") else b""
        if self.shaken and not self.ready:
            key = re.search(rb"Sec-WebSocket-Key: (\S+)", self.news)
            if self.client and b"\r\n\r\n" in self.news:
                self.ready = True
            elif self.client and "asked" not in self.acts:
                self.acts.add("asked")
                self.put(b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n"
                         b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r"
                         b"\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                         + self.subprotocol() + b"\r\n")
                self.ready = self.r.random() < 0.3  # talks before the answer
            elif not self.client and key and b"\r\n\r\n" in self.news:
                answer = base64.b64encode(hashlib.sha1(
                    key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
                self.put(b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection:"
                         b" Upgrade\r\nSec-WebSocket-Accept: %s\r\n%s\r\n"
                         % (answer, self.subprotocol()))
                self.ready = True
        if self.ready and self.held and "over" not in self.acts:
            held, self.held = self.held, []
            for data, payload in held:
                self.put(data, payload)
        self.hear()

    def subprotocol(self):
        return b"Sec-WebSocket-Protocol: sip\r\n" if self.sip else b""

    def hear(self):
        """Note the pings in what it has read."""
        news, before = self.news, self.owes
        if self.framing == "sip":
            *pings, rest = news.split(b"\r\n\r\n")
            self.owes += len(pings)
            news[:] = rest[-3:]
        elif not self.upgraded and b"\r\n\r\n" in news:
            self.upgraded = True
            del news[:news.find(b"\r\n\r\n") + 4]
        while self.upgraded and len(news) > 1:
            opcode, size = news[0] & 15, news[1] & 127
            long = {126: 2, 127: 8}.get(size, 0)
            size = int.from_bytes(news[2:2 + long], "big") if long else size
            end = 2 + long + 4 * (news[1] >> 7) + size
            if len(news) < end:
                break
            self.owes += opcode == 9
            del news[:end]
        if self.owes > before == 0:
            self.due = self.world.now + self.delay

    def answer(self):
        """Queue the pongs that it owes, or what it sends instead."""
        while self.owes and self.world.now >= self.due and not (
                self.rest or "over" in self.acts):
            self.owes -= 1
            pongs = [b"\r\n"] if self.framing == "sip" else [
                frame(10, b"", self.client)]
            if self.sip and self.framing == "ws":
                pongs += [frame(1, b"\r\n", self.client)]
            data = self.r.choice(pongs)
            if self.answers == "other":
                self.say()
            elif self.answers == "half":
                self.acts.add("part")
                self.rest = data[1:], PONG, b""
                self.put(data[:1])
            else:
                self.put(data, PONG)

    def put(self, data, payload=None):
        """Queue plain bytes; with them a message is complete."""
        if self.tls:
            with contextlib.suppress(ssl.SSLError):
                self.tls.write(data)
            data = self.outgoing.read()
        self.wire += data
        end = self.wired + len(self.wire)
        if payload is PONG:
            self.pongs.append(end)
        elif payload is not None:
            self.marks.append((end, payload))

    def say(self, cut=False):
        """Queue a message, or all but its end."""
        r, self.serial = self.r, self.serial + 1
        text = b"%d of %d " % (self.serial, self.number) + b"x" * r.choice(
            [0, 0, 0, 10, 300, 5000, 40000])
        data = payload = text
        if self.framing == "line":
            data = text + r.choice([b"\n", b"\r\n"])
        if self.sip:
            text = payload = (
                r.choice([b"OPTIONS sip:a SIP/2.0", b"SIP/2.0 200 OK"])
                + b"\r\nl: %d\r\n\r\n" % len(text) + text)
            data = r.choice([b"", b"", b"\r\n\r\n"]) + payload
        if self.framing == "ws":
            half = r.choice([0, 0, len(text) // 2])
            data = r.choice([b"", frame(9, b"ping", self.client)]) + (
                frame(2, text[:half], self.client, False) if half else b"")
            data += frame(0 if half else 2, text[half:], self.client)
        if self.rest or "over" in self.acts:
            return
        longest = self.world.low["max_message"]
        if self.framing != "raw" and len(payload) > longest:
            self.spoil("long")
        if cut:
            self.acts.add("part")
            at = r.randrange(1, len(data))
            raw = self.framing == "raw"
            self.rest = data[at:], data[at:] if raw else payload, data[:at]
            data = data[:at]
            payload = data if raw else None
        self.put(data, payload) if self.ready else self.held.append(
            (data, payload))

    def finish_part(self):
        """Queue the rest of a message, after what waits for the handshake."""
        if self.rest and self.ready and "over" not in self.acts:
            (data, payload, _), self.rest = self.rest, None
            self.put(data, payload)

    def spoil(self, act):
        """Note that nothing after the messages until now needs to count."""
        self.acts.add(act)
        if self.spoiled is None:
            self.spoiled = len(self.marks)

    def pump(self):
        """Read and write what can be; return whether anything moved."""
        if self.sock.fileno() < 0:
            return False
        before = self.read, self.wired, self.end
        if self.chats and self.ready and kernel_count(self.sock, "unread"):
            self.chats -= 1  # it talks when it hears something
            self.say()
            self.write()
        for _ in range({"all": 50, "slow": 1}.get(self.reads, 0)):
            try:
                data = b"" if self.end else self.sock.recv(
                    65536 if self.reads == "all" else 500)
            except BlockingIOError:
                break
            except OSError as error:
                self.end = "RST" if error.errno in (104, 54) else str(error)
            else:
                self.read += len(data)
                self.end = self.end or ("" if data else
                                        "RST" if self.broken else "FIN")
                if data and (self.tls or self.framing in ("sip", "ws")):
                    self.shake(data)
            if self.end == "FIN" and self.polite and self.fin is None:
                self.polite = False
                self.acts.add("FIN")
                self.finish("FIN")
            if self.end:
                break
        self.answer()
        self.write()
        return (self.read, self.wired, self.end) != before

    def write(self):
        """Hand bytes to the kernel, all of them or some."""
        while self.wire and self.fin is None:
            try:
                count = self.sock.send(self.wire[:self.drip or 65536],
                                       NOSIGNAL)
            except BlockingIOError:
                break
            except OSError:
                self.wire.clear()
                self.broken = True  # the error is reported but once
                break
            del self.wire[:count]
            self.wired += count
            self.times.append((self.wired, self.world.now))
            if self.drip:
                break

    def finish(self, how):
        """End our half or the whole: "FIN", "close" or "RST"."""
        if self.sock.fileno() < 0:
            return
        r, graceful = self.r, how != "RST" and self.r.random() < 0.7
        if how != "RST" and self.fin is None:
            if graceful and self.framing == "ws" and self.ready:
                if self.rest:  # a close frame within a frame
                    self.spoil("garbage")
                self.put(frame(8, b"\x03\xe8bye", self.client))
                self.acts.add("goodbye")
            if graceful and self.tls and self.shaken:
                with contextlib.suppress(ssl.SSLError):
                    self.tls.unwrap()
                self.wire += self.outgoing.read()
                self.acts.add("goodbye")
            self.drip = None
            self.write()
            if self.wire:
                self.acts.discard("goodbye")
            elif self.framing == "line" and self.rest:  # a FIN completes it
                self.marks.append((self.wired + 0.5, self.rest[2]))
        self.acts.add("over")
        if how == "FIN":
            self.fin = self.fin or tick()
            self.acts.add("FIN")
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            return
        if how == "close" and r.random() < 0.5:
            self.pump()
        waits = kernel_count(self.sock, "waits")
        self.floor = self.wired - waits
        resets = how == "RST" or kernel_count(self.sock, "unread") > 0
        if resets or waits:
            self.rst = tick()
            self.acts.add("RST")
        if not resets:
            self.fin = self.fin or tick()
            self.acts.add("FIN")
        if how == "RST":
            self.sock.setsockopt(ANY, socket.SO_LINGER,
                                 struct.pack("ii", 1, 0))
        self.sock.close()
        self.end = self.end or "closed"


class Makers:
    """The operations that make listeners, servers, connections and peers."""

    def pick(self, r):
        """Return (framing, TLS version or None) for a listener or server."""
        names = [name for name in ("raw", "line", "sip", "ws")
                 if name in env.tcpops.FRAMINGS]
        return r.choice(names), (r.choice(self.versions) if self.tls
                                 and r.random() < 0.6 else None)

    def add_peer(self, sock, local, remote, framing, client, version, r):
        context = version and env.tls[client, version]
        try:
            peer = Peer(len(self.peers), sock, (local, remote), framing,
                        client, context, random.Random(r.random()), self)
        except OSError:  # it is reset already
            return sock.close()
        self.peers.append(peer)
        self.by_address[local, remote] = peer
        return peer

    def do_listen(self, r):
        framing, version = self.pick(r)
        conid = self.call("listen", self.ops.listen, "127.0.0.1", 0,
                          framing=self.framings.get(framing, framing),
                          tls=version and env.tls[False, version])
        if conid is not None:
            held = self.ops._table.listeners[conid].sock
            if r.random() < 0.5:
                held.setsockopt(ANY, socket.SO_SNDBUF, 4096)
                held.setsockopt(ANY, socket.SO_RCVBUF, 4096)
            self.listeners[conid] = (held.getsockname(), framing, version)
            self.tell(f"it is {framing}, {version}")

    def do_peer(self, r):
        if not self.listeners:
            return
        address, framing, version = r.choice(list(self.listeners.values()))
        for _ in range(r.choice([1, 1, 1, 3])):
            sock = socket.socket()
            if r.random() < 0.5:
                sock.setsockopt(ANY, socket.SO_RCVBUF, 4096)
            if sock.connect_ex(address):
                return sock.close()
            if version and r.random() < 0.05:
                version = r.choice(self.versions)
                self.mixed = True
            self.add_peer(sock, sock.getsockname(), address, framing, True,
                          version, r)
            self.tell(f"peer {len(self.peers) - 1}: {framing}, {version}")

    def do_set_tls(self, r):
        for conid, (address, framing, version) in self.listeners.items():
            if version and conid in [x.conid for x in self.ops.listeners()]:
                self.mixed, version = True, r.choice(self.versions)
                self.call("set_tls", self.ops.set_tls, conid,
                          env.tls[False, version])
                self.listeners[conid] = address, framing, version

    def do_serve(self, r):
        mode = r.choice(["auto"] * 4 + ["late", "closed", "hang"])
        sock = socket.socket()
        if r.random() < 0.5:
            sock.setsockopt(ANY, socket.SO_RCVBUF, 4096)
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        if mode != "closed":
            sock.listen(0 if mode == "hang" else 50)
        if mode == "hang":  # its queue is full: a SYN is not answered
            self.kept.append(socket.create_connection(sock.getsockname()))
        framing, version = self.pick(r)
        self.servers.append(types.SimpleNamespace(
            sock=sock, mode=mode, address=sock.getsockname(), framing=framing,
            version=version, seed=r.random()))
        self.tell(f"server {sock.getsockname()}: {mode} {framing} {version}")

    def accept(self, server):
        try:
            sock, address = server.sock.accept()
        except OSError:
            return 0
        self.add_peer(sock, server.address, address, server.framing, False,
                      server.version, random.Random(server.seed))
        return 1

    def do_accept(self, r):
        for server in self.servers:
            if server.mode == "late":
                self.accept(server)

    def do_connect(self, r):
        if not self.servers:
            self.do_serve(r)
        server = r.choice(self.servers)
        host, port = server.address
        if r.random() < 0.2:  # a name with several addresses
            host = "storm.test"
            env.hosts[:] = [("127.0.0.9", 9), server.address]
        conid = self.call(
            "connect", self.ops.connect, host, port,
            framing=self.framings.get(server.framing, server.framing),
            tls=server.version and env.tls[True, server.version],
            **({"server_hostname": "localhost"} if server.version else {}))
        if conid is not None:
            life = self.life(conid)
            life.odd |= {server.mode, host == "storm.test" and "several"}
            if host == "storm.test" and self.call(
                    "tcp_keepalive_enable", self.ops.tcp_keepalive_enable,
                    conid, 60, 5, 5) == 1:  # for each of them
                self.granted("tcp_keepalive_enable", life, (60, 5, 5), b"")
            for _ in range(r.choice([0, 0, 1, 2])):
                self.anything(r, self.inside, new=conid)

    def do_attach(self, r, odd=False):
        framing, _ = self.pick(r)
        if self.closed != (odd == "closed"):
            return
        with socket.create_server(("127.0.0.1", 0)) as server:
            sock = socket.socket()
            if r.random() < 0.5:
                sock.setsockopt(ANY, socket.SO_RCVBUF, 4096)
            sock.connect(server.getsockname())
            ours = server.accept()[0]
        peer = self.add_peer(sock, sock.getsockname(), ours.getsockname(),
                             framing, True, None, r)
        for _ in range(r.choice([0, 0, 1])):
            peer.say()
        barrier()
        if odd == "linger":
            ours.setsockopt(ANY, socket.SO_LINGER, struct.pack("ii", 1, 30))
        elif odd == "lowat":
            ours.setsockopt(ANY, socket.SO_RCVLOWAT, 2000)
        elif odd == "cork":
            ours.setsockopt(TCP, getattr(socket, "TCP_CORK", 3), 1)
        elif odd == "shut":
            ours.shutdown(socket.SHUT_WR)
        self.tell(f"peer {len(self.peers) - 1}: {framing}, {odd or 'usual'}")
        conid = self.call("attach", self.ops.attach, ours,
                          framing=self.framings.get(framing, framing))
        if conid is None:
            self.kept.append(ours)
            return
        life = self.life(conid)
        life.peer = peer
        life.odd.add("attach")
        if odd == "twice":
            self.kept.append(ours.dup())
            if self.call("attach", self.ops.attach, self.kept[-1]) is not None:
                self.fault("a_socket_is_attached_once", f"{conid}, by a copy")
        if odd == "blocking":
            self.kept.append(ours.dup())
            self.kept[-1].setblocking(True)
        for _ in range(r.choice([0, 0, 1, 2])):
            self.anything(r, self.inside, new=conid)
        life.sock = ours
        if r.random() < 0.5 and not self.closed:
            self.do_attach_again(r)

    def do_attach_again(self, r):
        """Attach each socket that is attached once more, which is refused."""
        for life in list(self.lives.values()):
            sock = getattr(life, "sock", None)
            if sock is not None and sock.fileno() >= 0 and not life.ends and (
                    "steal" not in life.odd and not self.draining):
                if self.call("attach", self.ops.attach, sock) is not None:
                    self.fault("a_socket_is_attached_once", f"{life.conid}")

    def do_steal(self, r):
        """Close the descriptor of an attached socket behind the loop's back.
        """
        for life in self.lives.values():
            if getattr(life, "sock", None) and not life.ends:
                life.odd.add("steal")
                life.sock.close()

    def do_attend(self, r, forget=False):
        """A socket of the host's; at times closed without dismiss."""
        if self.closed:
            return
        a, b = socket.socketpair()
        self.kept += [a, b]
        b.send(b"x")
        self.call("attend", self.ops.attend, a, 1,
                  lambda mask: a.fileno() >= 0 and a.recv(9))
        self.settle(1)
        if not forget:
            self.call("dismiss", self.ops.dismiss, a)
        a.close()

    do_forget = functools.partialmethod(do_attend, forget=True)
