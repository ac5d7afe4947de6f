"""A page on which you break real connections, and see how each one ends.

    python3 examples/lanes.py                on a port that is free
    python3 examples/lanes.py --port 8070    on this one, and on the next

Open the address that it prints.  Each lane is a TCP connection on loopback:
our end is tcpops, the peer a plain socket.  The buttons at the peer's end do
to it what peers do; those at ours call the functions of the specification.

The page is lanes.html.  Only a browser on this machine can open it, and only
that page can press a button: Host and Origin are checked (lanes_page.py).  The
peers are in lanes_peer.py, the sentences in lanes_words.py.  To vanish, a peer
needs Linux, but not root.
"""

if __name__ == "__main__":
    import quiet  # before the rest: it may be interrupted there

import argparse
import collections
import errno
import itertools
import json
import reprlib
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tcpops
from lanes_page import NAMES, PageFraming, answer
from lanes_peer import (Peer, black_hole, listening, shaped, shut_port,
                        vanishing)
from lanes_words import (CLOSING, PASSED, REFUSED, STATES, UNTOLD, lesson,
                         passed)

TICK = 0.1  #: seconds between two probes of every lane
DRIP = 5    #: ticks between two bytes of a message that drips
MOST = 12   #: lanes at once
LINES = 40  #: of a lane's log

#: Short enough to be watched.
SETTINGS = dict(connection_lifetime=60, connect_timeout=5, send_timeout=5,
                message_timeout=5, max_message=4096)


# -- what can be done ---------------------------------------------------------


class Action(NamedTuple):
    """A button."""

    end: str       #: whose: "peer", "ours", or "new" for one that makes a lane
    key: str       #: of the keyboard
    label: str
    promise: str   #: one of REASONS that it leads to, or words
    run: Callable  #: (lane) -> what was done; None: see Lanes
    words: str = ""  #: to explain the label


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

ACTIONS = {
    "accept": Action("new", "n", "It connects to us", "open", None),
    "connect": Action("new", "m", "We connect to it", "open", None),
    "refused": Action("new", "o", "To a shut port", REFUSED, None),
    "hole": Action("new", "i", "To a black hole", "connect", None),
    "send": Action("peer", "s", "send", "one message", peer(Peer.send)),
    "fin": Action("peer", "f", "FIN", "eof, if all is read",
                  peer(Peer.fin)),
    "half": Action("peer", "h", "half-close", "eof", peer(Peer.half)),
    "rst": Action("peer", "r", "RST", "reset", peer(Peer.rst)),
    "late_rst": Action("peer", "b", "RST behind data", "reset",
                       peer(Peer.late_rst)),
    "drip": Action("peer", "d", "drip", "message", peer(Peer.drip)),
    "stop": Action("peer", "p", "stop reading", "send, with W",
                   peer(Peer.stop)),
    "resume": Action("peer", "u", "resume", "the queue moves",
                     peer(Peer.resume)),
    "vanish": Action("peer", "v", "vanish", "keepalive, with K",
                     peer(Peer.vanish)),
    "vanish_in_flight": Action("peer", "g", "vanish with data in flight",
                               "keepalive, with K", vanish_in_flight),
    "write": Action("ours", "w", "send 200 kB", "a queue, if unread",
                    ours("send", b"x" * 199999 + b"\n")),
    "keepalive": Action("ours", "k", "keepalive 1/1/3",
                        "keepalive, if the peer has vanished",
                        ours("tcp_keepalive_enable", 1, 1, 3),
                        "1 s idle, 1 probe, 3 s for its answer"),
    "lifetime": Action("ours", "l", "lifetime 5 s", "lifetime, if idle",
                       ours("tcp_set_connection_lifetime", 5)),
    "close": Action("ours", "c", "close", "closed",
                    ours("tcp_close_connection")),
}


# -- a lane -------------------------------------------------------------------


def described(state):
    """Return a State as the page shows it, "" for None."""
    return "" if state is None else f"{state} {state.name}"


class Lane:
    """A connection and its peer, as the page shows them."""

    #: The phases in which a connection may be that the program has closed: it
    #: takes no payload, delivers none, and no snapshot of it is to be had.
    CLOSING = [row.name for row in [*tcpops.LIFE.values()][1:]
               if row.next and not row.sends and not row.delivers]

    def __init__(self, ops, number, conid, how, peer=None, nobody=""):
        self.ops, self.number, self.conid = ops, number, conid
        self.peer, self._nobody = peer, nobody
        self.info, self.probed, self.end, self.messages = None, None, None, 0
        self.seen, self._known = [next(iter(tcpops.LIFE))], {}
        self._began = time.monotonic()
        self._log = collections.deque(maxlen=LINES)
        info = ops.connection(conid)
        how += f" {tcpops.format_address(info.si, info.sp)}" if info else ""
        self.shown = {"id": number, "conid": conid, "how": how,
                      "nobody": nobody}
        self.log(how)
        self.look()

    def log(self, line):
        """Add a line to what has happened to the lane, with its time."""
        self._log.append([time.monotonic() - self._began, line])
        self.shown["log"] = [*self._log]

    def usable(self):
        """Say whether our end takes anything from the program."""
        return self.info is not None and tcpops.LIFE[self.info.phase].sends

    def why_not(self, action):
        """Return why the button of an action can do nothing, or ""."""
        row = ACTIONS[action]
        if self.end:
            return "it has ended"
        if not self.usable() and (row.end == "ours"
                                  or row.run is vanish_in_flight):
            return "our end is closing"
        if row.end != "peer":
            return ""
        return self.peer.why_not(action) if self.peer else self._nobody

    def look(self):
        """Probe the connection, and note all that the page shows of it."""
        self.info = info = self.ops.connection(self.conid)
        kernel = self.peer and self.peer.kernel()
        phases = self.phases(kernel)
        if len(phases) == 1:
            self.add_seen(phases)
        now = self.ops.tcp_conid_state(self.conid)
        if info is not None:
            self.probed = info.state
            self.shown.update(
                queued=info.queued, bytes_in=info.bytes_in,
                bytes_out=info.bytes_out)
        self.log_changes({"probed": described(self.probed),
                          "phase": " or ".join(phases),
                          "the peer": self.peer and self.peer.fate,
                          "the peer's kernel": kernel})
        self.shown.update(
            probed=described(self.probed), told=info is not None,
            state=[now, described(now), STATES[now.name]],
            phases=phases, seen=self.seen, messages=self.messages,
            closing=not self.end and not self.usable(),
            caption=PASSED if self.end else "" if self.usable()
            else CLOSING.format(" or ".join(phases) + UNTOLD * (not info)),
            clocks=self.clocks(), end=self.end,
            peer=self.peer and {name: getattr(self.peer, name) for name in (
                "fate", "reading", "dripping", "received")},
            kernel=kernel, cannot={
                action: self.why_not(action) for action, row in ACTIONS.items()
                if row.run and self.why_not(action)})

    def phases(self, kernel):
        """Return the phase, or those of which one must be the phase."""
        if self.end:
            return ["ended"]
        if self.info is not None:
            return [self.info.phase]
        has_our_fin = kernel == "CLOSE_WAIT" and "open" in self.seen
        return self.CLOSING[-1:] if has_our_fin else self.CLOSING

    def add_seen(self, phases):
        """Note phases that were passed, in the order of LIFE."""
        if "open" in phases:  # with a framing, a handshake is before it
            phases = [*phases, "handshake"]
        self.seen = [name for name in tcpops.LIFE
                     if name in self.seen or name in phases]

    def log_changes(self, known):
        """Add a line if something is not as at the last look."""
        changes = [f"{name}: {word}" for name, word in known.items()
                   if word and self._known.get(name) != word]
        self._known = known
        if changes:
            self.log(", ".join(changes))

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
        number = event.errno and (
            f"{event.errno} {errno.errorcode.get(event.errno, '')}")
        self.end = {
            "reason": event.reason, "event": event.name, "errno": number,
            "detail": event.detail, "unsent": event.unsent,
            "seconds": event.age, "lesson": lesson(event)}
        self.add_seen(passed(event, self.probed))
        self.log(f"{event.name}, reason {event.reason}")
        self.shown.update(bytes_in=event.bytes_in, bytes_out=event.bytes_out,
                          queued=event.queued)


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
        try:
            conid = self.ops.listen("127.0.0.1", port, framing=framing)
        except OSError as error:
            error.filename = f"port {port}"
            raise
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
                lane.log(f"a message: {reprlib.repr(msg.data)}")

    def _event(self, event):
        if event.is_end:
            self._browsers.discard(event.conid)
            for lane in self._of(event.conid):
                lane.ended(event)
        elif event.proto == "ws":
            self._welcome(event.conid)
        elif event.listener == self._listener:
            peer = self._arriving.pop((event.si, event.sp), None)
            self._add(event.conid, "accepted from", peer,
                      "a program of your own")

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
        elif row is not None and lane is None:
            self._notice = f"{row.label}: there is no such lane"
        elif row is not None:
            lane.look()  # it may have changed since the page was told
            why_not = lane.why_not(action)
            if why_not:
                self._notice = f"{row.label}, lane {number}: {why_not}"
            else:
                lane.log(row.run(lane))

    def _new(self, kind):
        """Make a connection, and a lane of it."""
        why_not = self._note.partition(":")[0]  # for the button of vanish
        if kind == "accept" and self._elsewhere:
            ours, sock = self._elsewhere.pair()
            self._add(self.ops.attach(ours, framing="line"),
                      "both ends come from a network of their own: as if"
                      " accepted from",
                      Peer(self.ops, sock, self._elsewhere.vanish))
        elif kind == "accept":
            sock = shaped()
            sock.connect(("127.0.0.1", self.target))
            self._arriving[sock.getsockname()] = Peer(
                self.ops, sock, self._vanish, why_not)
        elif kind == "connect":
            with listening() as server:
                conid = self.ops.connect(*server.getsockname(),
                                         framing="line")
                # The kernel has answered by itself: this does not wait.
                sock = server.accept()[0]
            self._add(conid, "we connect to",
                      Peer(self.ops, sock, self._vanish, why_not))
        else:
            address = self._dead[kind][0].getsockname()
            self._add(self.ops.connect(*address, framing="line"),
                      "we connect to", nobody="no one answers here")

    def _add(self, conid, how, peer=None, nobody=""):
        """Add a lane; if there is no room, instead of one that has ended."""
        ended = [lane for lane in self._lanes.values() if lane.end]
        if len(self._lanes) >= MOST and ended:
            self._remove(ended[0])
        self._number += 1
        lane = Lane(self.ops, self._number, conid, how, peer, nobody)
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
    parser.error = lambda text: parser.exit(2, f"lanes.py: {text}\n")
    port = parser.parse_args().port
    if not 0 <= port < 65535:
        parser.error(f"--port {port}: it can be 0 to 65534, for the WebSocket"
                     " needs the next port")
    try:
        lanes = Lanes(port)
    except OSError as error:
        parser.exit(1, f"lanes.py: cannot listen on {error.filename}:"
                       f" {error.strerror}\n")
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
