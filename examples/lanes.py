"""A page on which you break real connections, and see how each one ends.

    python examples/lanes.py                on a port that is free
    python examples/lanes.py --port 8070    on this one, and on the next

Open the address that it prints.  Each lane is a TCP connection on loopback:
our end is tcpops, the peer a plain socket.  The buttons at the peer's end do
to it what peers do; those at ours call the functions of the specification.

The page is lanes.html.  Only a browser on this machine can open it, and only
that page can press a button: Host and Origin are checked.  The peers are in
lanes_peer.py; to vanish they need Linux, but not root.
"""

import argparse
import contextlib
import errno
import itertools
import json
import re
import reprlib
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tcpops
from lanes_peer import (Peer, black_hole, listening, shaped, shut_port,
                        vanishing)

PAGE = Path(__file__).with_name("lanes.html")
TICK = 0.1  #: seconds between two probes of every lane
DRIP = 5    #: ticks between two bytes of a message that drips
MOST = 12   #: lanes at once
NAMES = ("127.0.0.1", "localhost")  #: in Host and Origin

#: Short enough to be watched.
SETTINGS = dict(connection_lifetime=60, connect_timeout=5, send_timeout=5,
                message_timeout=5, max_message=4096)

#: One sentence for each of tcpops.REASONS.
LESSONS = {
    "eof": "The peer sent FIN: no more bytes from me. A close, a half-close"
           " and a killed program all send the same FIN, so we cannot know"
           " which of them it was.",
    "closed": "We closed it by its number: what we had queued went first, and"
              " our FIN behind it.",
    "protocol": "These bytes are not the protocol, so no one knows where the"
                " next message would begin.",
    "error": "The socket failed, and it was not the peer's doing.",
    "shutdown": "Our program ended, and every connection with it.",
    "reset": "The peer sent RST: both directions are over at once. Bytes that"
             " had arrived before it were still delivered; ours that were on"
             " their way are lost.",
    "refused": "The host answered our SYN with RST: it is there, but no"
               " program listens on that port.",
    "keepalive": "The peer vanished, and vanishing makes no sound: we know"
                 " only because we asked, and no answer came.",
    "lifetime": "No byte moved for as long as we allow. The peer may be in the"
                " best of health; it had nothing to say.",
    "connect": "No answer came to our SYN. A firewall that drops it and a host"
               " without power look the same, so we stop waiting.",
    "send": "The peer's kernel answers, but its program does not read: its"
            " window is shut, and our queue stood still for too long.",
    "message": "A message began and was not complete in time. A byte now and"
               " then does not help: else one slow peer could hold us for"
               " ever.",
}


# -- what can be done ---------------------------------------------------------


class Action(NamedTuple):
    """A button."""

    end: str       #: whose: "peer", "ours", or "new" for one that makes a lane
    key: str       #: of the keyboard
    label: str
    promise: str   #: one of REASONS that it leads to, or words
    run: Callable  #: (lane) -> what was done; None: see Lanes


def peer(method):
    """Return the function for a button at the peer's end."""
    return lambda lane: f"peer: {method(lane.peer)}"


def ours(name, *arguments):
    """Return the function for a button that calls a function of TcpOps."""
    def run(lane):
        answer = getattr(lane.ops, name)(lane.conid, *arguments)
        said = ", ".join(map(reprlib.repr, (lane.conid, *arguments)))
        return f"{name}({said}) = {answer}"
    return run


def vanish_in_flight(lane):
    """The peer vanishes first, so that no acknowledgement comes."""
    return f"peer: {lane.peer.vanish()}; {QUESTION(lane)}"


QUESTION = ours("send", b"are you there?\n")
REFUSED = "refused" if "refused" in tcpops.REASONS else "reset"

ACTIONS = {
    "accept": Action("new", "n", "It connects to us", "open", None),
    "connect": Action("new", "m", "We connect to it", "open", None),
    "refused": Action("new", "o", "To a shut port", REFUSED, None),
    "hole": Action("new", "i", "To a black hole", "connect", None),
    "send": Action("peer", "s", "send", "one message", peer(Peer.send)),
    "fin": Action("peer", "f", "FIN", "eof", peer(Peer.fin)),
    "half": Action("peer", "h", "half-close", "eof", peer(Peer.half)),
    "rst": Action("peer", "r", "RST", "reset", peer(Peer.rst)),
    "late_rst": Action("peer", "b", "RST behind data", "reset",
                       peer(Peer.late_rst)),
    "drip": Action("peer", "d", "drip", "message", peer(Peer.drip)),
    "stop": Action("peer", "p", "stop reading", "send, if we then send",
                   peer(Peer.stop)),
    "resume": Action("peer", "u", "resume", "the queue moves",
                     peer(Peer.resume)),
    "vanish": Action("peer", "v", "vanish", "keepalive, if that is on",
                     peer(Peer.vanish)),
    "vanish_in_flight": Action("peer", "g", "vanish with data in flight",
                               "keepalive, if that is on", vanish_in_flight),
    "write": Action("ours", "w", "send 200 kB", "a queue, if it does not read",
                    ours("send", b"x" * 199999 + b"\n")),
    "keepalive": Action("ours", "k", "keepalive 1/1/3",
                        "keepalive, if it has vanished",
                        ours("tcp_keepalive_enable", 1, 1, 3)),
    "lifetime": Action("ours", "l", "lifetime 5 s", "lifetime, if it is idle",
                       ours("tcp_set_connection_lifetime", 5)),
    "close": Action("ours", "c", "close", "closed",
                    ours("tcp_close_connection")),
}


# -- a lane -------------------------------------------------------------------


class Lane:
    """A connection and its peer, as the page shows them."""

    #: The phases in which a connection may be that is closing: it takes no
    #: payload, delivers none, and the program is told no more until its end.
    CLOSING = [row.name for row in [*tcpops.LIFE.values()][1:]
               if row.next and not row.sends and not row.delivers]

    def __init__(self, ops, number, conid, how, peer=None):
        self.ops, self.number, self.conid, self.peer = ops, number, conid, peer
        self.info, self.end, self.messages = None, None, 0
        self.said, self.seen = "alive", [next(iter(tcpops.LIFE))]
        self.shown = {"id": number, "conid": conid, "how": how}
        self.look()

    def may(self, action):
        """Say whether the button of an action can be pressed."""
        row = ACTIONS.get(action)
        if self.end or self.info is None or row is None or row.run is None:
            return False
        return row.end == "ours" or (
            self.peer is not None and self.peer.may(action))

    def look(self):
        """Probe the connection, and note all that the page shows of it."""
        self.info = info = self.ops.connection(self.conid)
        phases = (["ended"] if self.end
                  else self.CLOSING if info is None else [info.phase])
        if len(phases) == 1 and phases[0] not in self.seen:
            self.seen += phases
        state = self.ops.tcp_conid_state(self.conid)
        if info is not None:
            self.shown.update(
                peer_address=tcpops.format_address(info.si, info.sp),
                queued=info.queued, bytes_in=info.bytes_in,
                bytes_out=info.bytes_out)
        self.shown.update(
            state=self.end["state"] if self.end else [state, state.name],
            phases=phases, seen=self.seen, messages=self.messages,
            clocks=self.clocks(), said=self.said, end=self.end,
            peer=self.peer and {name: getattr(self.peer, name) for name in (
                "fate", "reading", "dripping", "received")},
            can=[action for action in ACTIONS if self.may(action)])

    def clocks(self):
        """Return [kind, seconds left or None, of how many, reason] of each."""
        info, ops = self.info, self.ops
        if info is None:
            return []
        wholes = {"connect": ops.connect_timeout, "send": ops.send_timeout,
                  "keepalive": info.keepalive and info.keepalive.limit,
                  "lifetime": info.lifetime}
        return [[kind, info.deadlines.get(kind),
                 wholes.get(kind, ops.message_timeout), row.reason]
                for kind, row in tcpops.DEADLINES.items()
                if kind in info.deadlines or kind in ("keepalive", "lifetime")]

    def ended(self, event):
        """Keep what the event of the end says."""
        state = self.ops.tcp_conid_state(self.conid)
        refused = event.reason == REFUSED and not event.opened
        number = event.errno and (
            f"{event.errno} {errno.errorcode.get(event.errno, '')}")
        self.end = {
            "reason": event.reason, "event": event.name, "errno": number,
            "detail": event.detail, "unsent": event.unsent,
            "seconds": event.age, "state": [state, state.name],
            "lesson": LESSONS["refused" if refused else event.reason]}
        self.shown.update(bytes_in=event.bytes_in, bytes_out=event.bytes_out,
                          queued=event.queued)


# -- the page -----------------------------------------------------------------


class PageFraming(tcpops.Framing):
    """A message is the head of an HTTP request; what is sent goes as it is."""

    longest = 8192

    def next_message(self):
        end = self.buffer.find(b"\r\n\r\n")
        if max(end, len(self.buffer) if end < 0 else 0) > self.longest:
            raise tcpops.ProtocolError(f"a head of over {self.longest} bytes")
        if end < 0:
            return None
        head = bytes(self.buffer[:end])
        self.buffer.clear()  # one request for each connection
        return head

    def encode(self, payload):
        return payload


def answer(head, port, feed):
    """Return the answer to a request for the page; both ports are ours."""
    lines = head.decode("latin-1").split("\r\n")
    request = re.fullmatch(r"([A-Z]+) (\S+) HTTP/1\.[01]", lines[0])
    hosts = [line.partition(":")[2].strip() for line in lines
             if line.lower().startswith("host:")]
    status, kind, body = "200 OK", "html", ""
    if not request:
        status = "400 Bad Request"
    elif len(hosts) != 1 or hosts[0] not in [f"{n}:{port}" for n in NAMES]:
        status = "403 Forbidden"  # a name of theirs may lead to 127.0.0.1
    elif request[1] not in ("GET", "HEAD"):
        status = "405 Method Not Allowed"
    elif request[2] != "/":
        status = "404 Not Found"
    else:
        body = PAGE.read_text(encoding="utf-8").replace("FEED", str(feed))
    if not body:
        kind, body = "plain", status + "\n"
    feeds = " ".join(f"ws://{name}:{feed}" for name in NAMES)
    data = body.encode()
    headers = [
        f"HTTP/1.1 {status}", f"Content-Type: text/{kind}; charset=utf-8",
        f"Content-Length: {len(data)}", "Allow: GET, HEAD",
        "Cache-Control: no-store", "X-Content-Type-Options: nosniff",
        "Content-Security-Policy: default-src 'none'; img-src data:;"
        " style-src 'unsafe-inline'; script-src 'unsafe-inline';"
        f" connect-src {feeds}; frame-ancestors 'none'; base-uri 'none';"
        " form-action 'none'", "Connection: close", "", ""]
    bare = request and request[1] == "HEAD"
    return "\r\n".join(headers).encode() + (b"" if bare else data)


# -- all of it ----------------------------------------------------------------


class Lanes:
    """The lanes, the page and the browsers that show it, in one loop."""

    def __init__(self, port=0):
        self.ops = tcpops.TcpOps(**SETTINGS)
        self._lanes, self._number = {}, 0  # by number
        self._arriving = {}  # peers that connect, by their address
        self._browsers = set()  # conids
        self._dead = {"refused": shut_port(), "hole": black_hole()}
        self._elsewhere, self._vanish, self._note = vanishing()
        self._ticks, self._notice, self._stopping = 0, "", False
        self.ops.request_route(self._message)
        for name in tcpops.EVENT_NAMES:
            self.ops.event_route(name)(self._event)
        self._listener, self.target = self._listen(0, "line")
        _, self.port = self._listen(port, PageFraming)

        class Feed(tcpops.WebSocketFraming):
            """The page's WebSocket; any page may try to open it."""

            subprotocols = ()
            refuse = staticmethod(self._refuse)
        _, self.feed = self._listen(port and port + 1, Feed)

    def _listen(self, port, framing):
        conid = self.ops.listen("127.0.0.1", port, framing=framing)
        return conid, self.ops.connection(conid).Rp

    def _refuse(self, path, headers):
        fields = {name: [value for other, value in headers if other == name]
                  for name in ("host", "origin")}
        if fields["host"] not in [[f"{n}:{self.feed}"] for n in NAMES]:
            return "wrong Host"
        if fields["origin"] not in [[f"http://{n}:{self.port}"]
                                    for n in NAMES]:
            return "wrong Origin"
        return None if path == "/" else "wrong path"

    def _message(self, msg):
        """Serve a browser, or count for a lane."""
        if msg.conid in self._browsers:
            self._pressed(msg)
        elif isinstance(msg.framing, PageFraming):
            msg.reply(answer(msg.data, self.port, self.feed))
            self.ops.tcp_close_connection(msg.conid)
        else:
            for lane in self._of(msg.conid):
                lane.messages += 1

    def _event(self, event):
        if event.is_end:
            self._browsers.discard(event.conid)
            for lane in self._of(event.conid):
                lane.ended(event)
        elif event.proto == "ws":
            self._welcome(event.conid)
        elif event.listener == self._listener:
            peer = self._arriving.pop((event.si, event.sp), None)
            self._add(event.conid, "accepted from" if peer
                      else "accepted from a program at", peer)

    def _of(self, conid):
        return [lane for lane in self._lanes.values() if lane.conid == conid]

    def _welcome(self, conid):
        """Give a browser what does not change, and something to look at."""
        self.ops.send(conid, json.dumps({
            "life": {name: row._asdict() for name, row
                     in tcpops.LIFE.items()},
            "note": self._note, "target": self.target, "actions": {
                name: row._replace(run=None)._asdict()
                for name, row in ACTIONS.items()}}))
        self._browsers.add(conid)
        if not self._lanes:
            self._new("accept")

    def _pressed(self, msg):
        """Do what a button of the page says; end a browser that talks junk."""
        try:
            command = json.loads(msg.data)
            action, number = command["do"], command.get("lane")
            lane = self._lanes.get(number)
            row = ACTIONS.get(action)
        except (ValueError, LookupError, TypeError, AttributeError,
                RecursionError):
            self._browsers.discard(msg.conid)
            self.ops.tcp_close_connection(msg.conid)
            return
        self._notice = ""
        if action == "clear":
            for lane in [*self._lanes.values()]:
                if lane.end:
                    self._remove(lane)
        elif row is not None and row.run is None:
            self._new(action)
        elif lane is not None:
            lane.look()  # it may have changed since the page was told
            if lane.may(action):
                lane.said = row.run(lane)

    def _new(self, kind):
        """Make a connection, and a lane of it."""
        if kind == "accept" and self._elsewhere:
            ours, sock = self._elsewhere.pair()
            self._add(self.ops.attach(ours, framing="line"), "attached to",
                      Peer(self.ops, sock, self._elsewhere.vanish))
        elif kind == "accept":
            sock = shaped()
            sock.connect(("127.0.0.1", self.target))
            self._arriving[sock.getsockname()] = Peer(self.ops, sock,
                                                      self._vanish)
        elif kind == "connect":
            with listening() as server:
                conid = self.ops.connect(*server.getsockname(),
                                         framing="line")
                # The kernel has answered by itself: this does not wait.
                sock = server.accept()[0]
            self._add(conid, "connected to",
                      Peer(self.ops, sock, self._vanish))
        else:
            address = self._dead[kind][0].getsockname()
            self._add(self.ops.connect(*address, framing="line"),
                      "connecting to")

    def _add(self, conid, how, peer=None):
        """Add a lane; if there is no room, instead of one that has ended."""
        ended = [lane for lane in self._lanes.values() if lane.end]
        if len(self._lanes) >= MOST and ended:
            self._remove(ended[0])
        self._number += 1
        lane = Lane(self.ops, self._number, conid, how, peer)
        self._lanes[self._number] = lane
        if len(self._lanes) > MOST:
            self._notice = f"{MOST} lanes are all that fit: end one first"
            self.ops.tcp_close_connection(conid)
            self._remove(lane)

    def _remove(self, lane):
        del self._lanes[lane.number]
        if lane.peer is not None:
            lane.peer.close("removed")

    def tick(self):
        """Probe every lane, and show it to every browser."""
        self._ticks += 1
        for lane in self._lanes.values():
            if (lane.peer and lane.peer.dripping
                    and self._ticks % DRIP == 0):
                lane.peer.send(b".")
            lane.look()
        text = json.dumps({"notice": self._notice, "lanes": [
            lane.shown for lane in self._lanes.values()]})
        for conid in self._browsers:  # one that does not read is left out
            self.ops.send(conid, text)

    def stop(self, *_signal):
        """Have run() return soon; at the second signal leave at once."""
        if self._stopping:
            raise KeyboardInterrupt
        self._stopping = True

    def run(self):
        """Serve until stop()."""
        due = time.monotonic()
        while not self._stopping:
            self.ops.step(max(0, due - time.monotonic()))
            if time.monotonic() >= due:
                self.tick()
                due = max(due + TICK, time.monotonic())

    def close(self):
        """End every connection: the page is told."""
        self.ops.drain(1)
        for lane in [*self._lanes.values()]:
            self._remove(lane)
        self.ops.close()
        for sock in itertools.chain(*self._dead.values()):
            sock.close()
        if self._elsewhere:
            self._elsewhere.close()


def main():
    parser = argparse.ArgumentParser(
        description="Serves a page on which one breaks real connections.")
    parser.add_argument("--port", type=int, default=0,
                        help="of the page; its WebSocket has the next one")
    try:
        lanes = Lanes(parser.parse_args().port)
    except ValueError as error:
        parser.error(error)
    except OSError as error:
        parser.exit(1, f"lanes.py: cannot listen: {error.strerror}\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lanes.stop)
    print(f"open http://127.0.0.1:{lanes.port} (Ctrl-C ends it)", flush=True)
    try:
        lanes.run()
        lanes.close()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
