"""An answer to each exercise of exercises.py; not the only ones.

    python3 examples/exercises.py 7 examples/solutions.py
"""

import socket
import time

import tcpops


# 1  Idle lifetimes, one for each connection


def lifetimes(ops, silent, known):
    ops.connection_lifetime = silent  # of connections made from now on

    @ops.request_route
    def on_message(msg):
        ops.tcp_set_connection_lifetime(known)  # of the message's connection


# 2  Bound a client that drips
# Not by a lifetime: each byte renews it.


def bound(ops, seconds):
    ops.message_timeout = seconds


# 3  Why does this server miss an RST?
# Reading SO_ERROR clears it: whoever asks first must remember the answer, and
# recv() then says a clean end of the stream.


class Server:
    def __init__(self, sock):
        self.sock = sock
        self.error = 0

    def alive(self):
        self.error = self.error or self.sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_ERROR)
        return not self.error

    def serve(self):
        received = b""
        try:
            while data := self.sock.recv(4096):
                received += data
        except ConnectionResetError as error:
            self.error = error.errno
        return received, "reset" if self.error else "eof"


# 4  Notice a peer that has vanished
# idle + count * interval must not be over the limit.


def watch(ops, limit, gone):
    @ops.event_route("tcp:opened")
    def on_open(event):
        ops.tcp_keepalive_enable(event.conid, limit - 1, 1, 1)

    @ops.event_route("tcp:timeout")
    def on_timeout(event):
        if event.reason == "keepalive":
            gone(event.conid)


# 5  Refuse a WebSocket by its path


def rooms(names):
    class Rooms(getattr(tcpops, "WebSocketFraming", object)):
        def refuse(self, path, headers):
            if path.partition("?")[0] not in [f"/chat/{name}"
                                              for name in names]:
                return f"there is no {path}"
    return Rooms


# 6  Add a framing


class Prefixed(tcpops.Framing):
    def next_message(self):
        if len(self.buffer) < 4:
            return None
        end = 4 + int.from_bytes(self.buffer[:4], "big")
        if end - 4 > self.max_message:
            raise tcpops.ProtocolError(f"a message of {end - 4} bytes")
        if len(self.buffer) < end:
            return None
        payload = bytes(self.buffer[4:end])
        del self.buffer[:end]
        return payload

    def encode(self, payload):
        return len(payload).to_bytes(4, "big") + payload


# 7  Close without losing a byte
# close() with unread bytes, or before a byte that is to come, is an RST, and
# the peer loses what it has not read.  So our FIN goes first, and the peer's
# bytes are thrown away until its FIN.  One deadline for all: a timeout for
# each recv() would be renewed by a peer that drips.


def answer_and_close(sock, data, seconds):
    end = time.monotonic() + seconds

    def left():
        return max(0.001, end - time.monotonic())
    with sock:
        try:
            sock.settimeout(left())
            sock.sendall(data)  # the timeout is for all of it
            sock.shutdown(socket.SHUT_WR)
            while time.monotonic() < end:
                sock.settimeout(left())
                if not sock.recv(65536):
                    return True
        except OSError:  # the time is over, or an RST has come
            pass
        return False


# 8  A forwarder: pair the connections
# ops.forward would do for one client: its bytes go to the target on one
# connection for all.


def forwarder(ops, host, port):
    others = {}  # the conid at the other side

    @ops.event_route("tcp:opened")
    def on_open(event):
        if event.origin == "accept":
            conid = ops.connect(host, port)  # what is sent meanwhile waits
            others[event.conid], others[conid] = conid, event.conid

    @ops.request_route
    def on_message(msg):
        if not ops.send(others[msg.conid], msg.data):
            ops.tcp_close_connection(msg.conid)  # on_end closes the other

    @ops.event_route("tcp:closed")  # and of resets and timeouts
    def on_end(event):
        other = others.pop(event.conid)
        if other in others:
            ops.tcp_close_connection(other)  # which first sends its queue


# 9  Back pressure: a reader that is too slow


def feed(ops):
    lost = {}  # lines, by conid

    @ops.event_route("tcp:opened")
    def on_open(event):
        lost[event.conid] = 0

    @ops.event_route("tcp:closed")
    def on_end(event):
        del lost[event.conid]

    def publish(line):
        for conid in lost:
            if lost[conid] and ops.send(conid, b"lost %d" % lost[conid]):
                lost[conid] = 0
            if lost[conid] or not ops.send(conid, line):
                lost[conid] += 1
    return publish


# 10  Write a conformance scenario


def scenario(lab):
    client, asker = lab.client(), lab.client()
    conid = client.conid
    answers = [asker.ask(name, conid=conid) for name in (
        "tcp_close_connection", "tcp_conid_state", "tcp_close_connection")]
    return (answers == ["1", "-1", "-1"] and asker.talk().isdigit()
            and lab.told(client) == "tcp:closed"
            and lab.ends(client)[0].conid == conid)
