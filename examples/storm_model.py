"""What storm.py sees of a program, and how that is judged: the invariants, and
the kernel's own record.
"""

import bisect
import collections
import contextlib
import gc
import logging
import os
import random
import re
import sys
import time
import traceback

from storm_peers import JUMPS, NEVER, env, tick


class Purpose(Exception):
    """Raised by handlers, on purpose."""


def objects():
    """Count the objects that belong to connections."""
    kinds = (env.tcpops.Connection, env.tcpops.Listener, env.tcpops.Messages,
             env.tcpops.Opening)
    return collections.Counter(type(thing).__name__
                               for thing in gc.get_objects()
                               if type(thing) in kinds)


def descriptors():
    """Count this process's descriptors, where that can be told."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/fd"))
    return 0


class Life:
    """What was seen of one conid."""

    def __init__(self, conid, now, ticks):
        self.conid, self.begun, self.ticks = conid, now, ticks
        self.opened = self.taken = 0
        self.pings = []        # of each: when, and bytes_in
        self.ends, self.messages, self.peer = [], [], None
        self.asked = None      # when tcp_close_connection has returned 1
        self.lifetimes, self.keepalive, self.odd = [], None, set()
        self.in_close = False
        self.active, self.over = float("-inf"), now  # last message; the end


class Seen(logging.Handler):
    """What was seen of one program; its handlers, and what they promise."""

    def tell(self, text):
        self.story.append(f"{self.at:4}{'  ' * self.depth}  {text}")

    def fault(self, invariant, text):
        """Note that an invariant does not hold."""
        if not self.wrong[invariant]:
            self.tell(f"WRONG: {invariant.replace('_', ' ')}: {text}")
        self.wrong[invariant].append(f"operation {self.at}: {text}")

    def emit(self, record):
        error = record.exc_info and record.exc_info[1]
        if error and not isinstance(error, Purpose):
            self.fault("the_log_has_no_traceback_of_ours", "".join(
                traceback.format_exception(*record.exc_info))[-1500:])

    def life(self, conid):
        if conid not in self.lives:
            self.lives[conid] = Life(conid, self.now, tick())
        return self.lives[conid]

    def ends_all(self):
        """Note that the program ends every connection from now on."""
        if self.ended is None:
            self.ended, self.ended_at = tick(), time.monotonic()

    def find_peer(self, life, it):
        """Find the peer of a connection by the addresses of an event."""
        life.peer = life.peer or self.by_address.get(
            ((it.si, it.sp), (it.Ri, it.Rp)))
        conn = self.ops._table.connections.get(life.conid)
        if life.peer and conn and (
                conn.plan.name != life.peer.framing
                or (conn.plan.context is None) == bool(life.peer.tls)):
            life.peer.acts.add("garbage")  # forward has chosen another
            life.peer.spoiled = 0

    def on_ping(self, framing):
        """Look whether the framing of a connection may send a ping."""
        conn = next(conn for conn in self.ops._table.connections.values()
                    if conn.messages and conn.messages.inner is framing)
        life, info = self.life(conn.conid), self.ops.connection(conn.conid)
        self.tell(f"ping of {conn.conid}")
        peer = life.peer
        if info.queued or peer and (
                peer.arrived > info.bytes_in
                or silence(life, peer, info, self.now) + 1e-6
                < framing.ping_interval
                or life.pings and not has_answered(life, peer, info.bytes_in)):
            self.fault("a_ping_asks_a_silent_peer",
                       f"{conn.conid}: {info.queued} bytes queued, pings"
                       f" {life.pings}, arrived {peer and peer.arrived} of"
                       f" {info}")
        life.pings.append((self.now, info.bytes_in))

    def on_message(self, msg, kind="message"):
        life = self.life(msg.conid)
        self.find_peer(life, msg)
        self.messages[msg.conid] = msg
        life.messages.append(msg.data)
        life.active = self.turn
        if not life.opened:
            self.fault("opened_first", f"a message of {msg.conid} before it")
        if life.ends:
            self.fault("nothing_after_the_end", f"a message of {msg.conid}")
        if self.ops.conid != msg.conid:
            self.fault("the_handler_knows_its_conid", f"{self.ops.conid}")
        self.act(kind, msg.conid, f"{len(msg.data)} bytes", msg)

    def on_event(self, event):
        life, ops = self.life(event.conid), self.ops
        self.find_peer(life, event)
        text = f"{event.name} {event.reason} {event.detail}"
        if life.ends:
            self.fault("nothing_after_the_end", f"{event.conid}: {text}")
        if ops.conid != event.conid or ops.event != event:
            self.fault("the_handler_knows_its_conid", f"{ops.conid}")
        if event.is_end:
            life.ends.append(event)
            life.over = self.now
            life.arrived = life.peer.arrived if life.peer else 0
            life.in_close = self.closed or self.draining
            self.times[event.conid] = time.monotonic(), tick(), self.now
            state = ops.tcp_conid_state(event.conid)
            if (event.name != env.tcpops.REASONS[event.reason] or state != (
                    {"eof": -2, "closed": -1, "shutdown": -1}.get(
                        event.reason, -3))):
                self.fault("the_end_has_its_event_and_its_state",
                           f"{text}, state {state}")
        else:
            life.opened += 1
            if life.messages or life.opened > 1:
                self.fault("opened_first", f"{event.conid}: {text} comes late")
            self.check_keepalive(life)
        self.act("event", event.conid, text, None)

    def on_callback(self, name):
        if self.ops.event.name != name:
            self.fault("the_handler_knows_its_conid", name)
        self.on_event(self.ops.event)

    def act(self, kind, conid, text, msg):
        """Do what a handler does when it is called, by seed and number."""
        self.progress += 1
        self.counts[conid] += 1
        self.tell(f"{kind} of {conid}: {text}")
        if self.inside is not None:
            self.fault("handlers_do_not_overlap", f"{kind} of {conid}")
        r = random.Random(f"{self.seed} {kind} {conid} {self.counts[conid]}")
        before, self.inside = self.inside, conid
        self.depth += 1
        try:
            for _ in range(r.choice([0, 0, 1, 1, 2]) if self.counts[conid] < 20
                           else 0):
                self.anything(r, conid, msg)
            if r.random() < 0.03:
                self.busy.append((tick(), r.choice(JUMPS)))
                self.now += self.busy[-1][1]
            if r.random() < 0.05:
                error = r.choice([Purpose] * 5 + [KeyboardInterrupt])
                self.leaving += error is KeyboardInterrupt
                raise error("on purpose")
        finally:
            self.depth -= 1
            self.inside = before

    def soon(self, number):
        self.progress += 1
        self.tell(f"called soon: {number}")
        if self.ops.conid is not None:
            self.fault("the_handler_knows_its_conid", "called soon")
        before, self.inside = self.inside, self.inside or 0
        self.depth += 1
        try:
            self.anything(random.Random(f"{self.seed} soon {number}"))
            if number % 7 == 0:
                raise Purpose("on purpose")
        finally:
            self.depth -= 1
            self.inside = before

    def granted(self, name, life, args, payload):
        """Note what a call that has returned 1 has promised."""
        info = self.ops.connection(life.conid)
        if name in ("send", "reply"):
            life.taken += len(payload)
        elif name == "tcp_close_connection":
            if life.asked is None:
                life.asked, life.asked_at = tick(), time.monotonic()
            conn = self.ops._table.connections.get(life.conid)
            if (self.ops.event is None or self.ops.conid != life.conid) and (
                    self.ops.tcp_conid_state(life.conid) != -1
                    or info is not None or life.conid in self.ops.conids()):
                self.fault("a_closed_conid_is_gone", f"{life.conid}")
            if conn and self.ops.tcp_get_conid(
                    "%s:%d" % conn.peer) == life.conid:
                self.fault("a_closed_conid_is_gone", f"{life.conid}: found")
        elif name == "tcp_set_connection_lifetime":
            life.lifetimes.append(float(args[0]))
        elif name == "tcp_keepalive_disable":
            life.keepalive = None
        elif name == "tcp_keepalive_enable":
            life.keepalive = tuple(map(int, args))
            life.odd.add("keepalive")
            due = info and info.deadlines.get("keepalive")
            idle, count, interval = life.keepalive
            if due is not None and due > idle + count * interval + 0.001:
                self.fault("a_granted_keepalive_is_there",
                           f"{life.conid}: due in {due}")
            self.check_keepalive(life)

    def sent(self):
        """Return how many bytes each connection has sent or queued."""
        return {conn.conid: conn.bytes_out + conn.queued()
                for conn in self.ops._table.connections.values()}

    def check_keepalive(self, life):
        """Look whether the kernel, and a deadline of ours, have it."""
        info = self.ops.connection(life.conid)
        if info and info.state > 0 and "steal" not in life.odd and (
                info.keepalive != life.keepalive or (
                    info.keepalive is None) == ("keepalive" in info.deadlines)
        ):
            self.fault("a_granted_keepalive_is_there",
                       f"{life.conid}: {info.keepalive}, {info.deadlines},"
                       f" granted {life.keepalive}")

    def check_call(self, name, args, value):
        if name == "tcp_get_conid" and value is not None:
            there = [info.conid for info in self.ops.connections()
                     if f"{info.si}:{info.sp}" == args[0] and info.state > 0
                     and self.ops.tcp_conid_alive(info.conid) > 0]
            if value > 0 and value not in self.ops.conids() or (
                    value < 0 and there):
                self.fault("found_by_address_is_usable",
                           f"{args[0]}: {value}, there are {there}")
        elif name == "connection" and value and value.origin != "listen":
            self.check_keepalive(self.life(value.conid))

    def setting(self, name, value):
        if name == "closed_event":
            self.modes.add(value)
        elif value is not None:
            self.low[name] = min(value, self.low[name] or value)

    def look(self):
        """Return what a turn may change."""
        ops = self.ops
        if self.closed:
            return None
        return (self.progress, str(ops.stats()), len(ops.listeners()), len(
            ops._reactor._work), [
            (conn.phase, conn.events, len(conn.queue or ()), conn.failed)
            for conn in ops._table.connections.values()])

    def check_quiet(self):
        """Look at the deadlines while nothing happens."""
        ops, due = self.ops, self.ops.next_deadline()
        for info in ops.connections():
            if info.deadline is None:
                continue
            if due is None or due > max(info.deadline, self.now):
                self.fault("next_deadline_is_not_late",
                           f"{due}, {info.conid} has {info.deadlines}")
            if info.deadline <= self.now:
                self.fault("a_deadline_fires",
                           f"{info.conid} at {self.now}: {info.deadlines}")
        for conn in ops._table.connections.values():
            inner = conn.messages and conn.messages.inner
            if inner and inner.ping_interval < NEVER and conn.events & 1 and (
                    conn.phase.name == "open" and not {"ping", "pong"}
                    & ops.connection(conn.conid).deadlines.keys()):
                self.fault("a_ping_is_to_come", f"{conn.conid}")
        heap = ops._reactor.deadlines._heap
        held = len(ops._table.connections) + len(ops._table.listeners)
        if len(heap) > 2 * held + 16 or any(
                when == owner.fires_at and owner.phase.name == "ended"
                for when, _, owner in heap):
            self.fault("nothing_is_left_over", f"the heap: {heap}")


# -- the invariants ----------------------------------------------------------

#: Those that are seen while it happens: see World.fault.
SEEN = {
    "opened_first":
    "There is one tcp:opened at the most, before any message.",
    "nothing_after_the_end":
    "After its end a conid has neither messages nor events.",
    "handlers_do_not_overlap":
    "No handler runs inside another.",
    "the_handler_knows_its_conid":
    "In a handler, conid and event are those of its connection.",
    "the_end_has_its_event_and_its_state":
    "An end's event is the one of its reason, and so is the state.",
    "calls_raise_what_is_documented":
    "No call raises anything that its documentation does not name.",
    "the_log_has_no_traceback_of_ours":
    "What is logged with a traceback was raised by the program's handlers.",
    "a_closed_conid_is_gone":
    "Once tcp_close_connection has returned 1 nothing finds the conid.",
    "a_granted_keepalive_is_there":
    "Keepalive that was granted holds in the kernel and in our deadlines.",
    "found_by_address_is_usable":
    "An address finds a connection that lives, if there is one.",
    "next_deadline_is_not_late":
    "next_deadline() is no later than that of any connection.",
    "a_deadline_fires":
    "Once all is quiet no deadline is in the past.",
    "a_ping_is_to_come":
    "Where a peer is read and has pings, a ping or the end for want of a pong"
    " is to come.",
    "a_ping_asks_a_silent_peer":
    "A ping goes to a peer that has been silent for ping_interval, and has"
    " answered the last, while no byte of ours waits.",
    "a_socket_is_attached_once":
    "A socket that is attached cannot be attached again.",
    "no_spin":
    "No turns in a row handle something while nothing changes.",
    "no_hang":
    "The program ends in time.",
}

INVARIANTS = []  #: those that look at the whole, afterwards


def invariant(function):
    """Decorator: enter it into both."""
    INVARIANTS.append(function)
    SEEN[function.__name__] = function.__doc__
    return function


@invariant
def one_end(world):
    """Every conid handed out ends once, and is counted."""
    last = world.stats["begun"] + len(world.listeners)
    for conid in range(1, last + 1):
        life = world.lives.get(conid)
        count = len(life.ends) if life else 0
        if count > 1 or world.modes == {1} and (
                count != (conid not in world.listeners)):
            yield f"{conid} has {count} ends"
    if sum(world.stats["ended"].values()) != world.stats["begun"]:
        yield f"the counts differ: {world.stats}"


def each_end(world):
    """Yield (life, its event, its peer, what the peer did)."""
    for life in world.lives.values():
        for event in life.ends[:1]:
            yield (life, event, life.peer,
                   life.peer.acts if life.peer else set())


@invariant
def the_reason_is_possible(world):
    """A reason is among those that peer, program and settings allow."""
    for life, event, peer, acts in each_end(world):
        allowed = possible(world, life, event, peer, acts)
        if event.reason not in allowed:
            yield (f"{life.conid} {event.origin} {event.proto}:"
                   f" {event.reason} ({event.detail}), allowed {allowed};"
                   f" peer {peer and peer.number}: {sorted(acts)}")


def possible(world, life, event, peer, acts):
    """Return the reasons that what has happened allows."""
    low, allowed = world.low, set()
    tls, ws = event.proto in ("tls", "wss"), event.proto in ("ws", "wss")
    age = event.age + 1e-6
    reset_at = peer and peer.fin is None and peer.rst
    for asked, reason in ((life.asked, "closed"), (world.ended, "shutdown")):
        if asked and not (reset_at and reset_at < asked):
            allowed.add(reason)
    if "goodbye" in acts or "FIN" in acts and not tls:
        allowed.add("eof")
    if "RST" in acts or event.origin == "connect" and (
            not event.opened and peer is None):
        allowed.add("reset")
    if acts & {"garbage", "long", "alert"} or tls and (
            world.mixed or "FIN" in acts and "goodbye" not in acts):
        allowed.add("protocol")
    if age >= low["message_timeout"] and (not event.opened or acts & {
            "part", "slow", "pause", "vanish", "garbage", "long"} or peer and (
                peer.wire or peer.drip)):
        allowed.add("message")
    shortest = min([*life.lifetimes, low["connection_lifetime"]])
    if min(age, life.over - life.active + 1e-6) >= shortest and (
            event.opened or life.lifetimes):
        allowed.add("lifetime")
    if event.origin == "connect" and not event.opened and (
            age >= low["connect_timeout"]):
        allowed.add("connect")
    if age >= low["send_timeout"] and event.queued:
        allowed.add("send")
    if event.detail.startswith("no pong") or "keepalive" in life.odd and (
            "vanish" in acts):  # see a_peer_that_answers_is_kept
        allowed.add("keepalive")
    if "steal" in life.odd:
        allowed.add("error")
    return sorted(allowed)


@invariant
def a_busy_loop_blames_no_one(world):
    """Time in which a handler ran counts neither as the peer's delay nor as
    its network's: for the reasons message and connect it is taken off.
    """
    for life, event, peer, acts in each_end(world):
        over = world.times[life.conid][1]
        busy = sum(jump for at, jump in world.busy if life.ticks < at < over)
        name = {"message": "message_timeout", "connect": "connect_timeout"}
        if event.reason in name and event.age - busy + 1e-6 < world.low[
                name[event.reason]]:
            yield (f"{life.conid} {event.reason} ({event.detail}) at the age"
                   f" of {event.age}, of which a handler took {busy}")


def silence(life, peer, info, now):
    """Return the seconds since the last byte that was read of a peer was
    sent, or our last ping; of one that has done neither since it began.
    """
    at = bisect.bisect_left(peer.times, (info.bytes_in, 0))
    heard = [when for _, when in peer.times[at:at + 1] if info.bytes_in]
    asked = [when for when, _ in life.pings[-1:]]
    return min([info.age, *(now - when for when in heard + asked)])


def has_answered(life, peer, count):
    """Whether so many bytes of a peer's contain a pong for the last ping."""
    before = life.pings[-1][1]
    return any(before < end <= count for end in peer.pongs) or (
        peer.framing == "sip" and before < count)  # CR LFs before a message


@invariant
def a_peer_that_answers_is_kept(world):
    """What ends for want of a pong has had none for its last ping, and since
    then not a byte for ping_timeout.
    """
    for life, event, peer, acts in each_end(world):
        if peer is None or not event.detail.startswith("no pong"):
            continue
        silent = silence(life, peer, event, life.over)
        before = life.pings[-1][1]
        if life.arrived > event.bytes_in or peer.spoiled is None and any(
                before < end <= event.bytes_in for end in peer.pongs) or (
                silent + 1e-6 < world.pings["ping_timeout"]):
            yield (f"{life.conid} {event.proto}: silent for {silent} s, pings"
                   f" {life.pings}, pongs {peer.pongs}, arrived"
                   f" {life.arrived} of {event.bytes_in}")


@invariant
def messages_are_what_the_peer_sent(world):
    """Delivered messages are the first of the peer's, in order, unchanged."""
    for life, event, peer, acts in each_end(world):
        sent, seen = sent_and_seen(life, peer)
        if sent[:len(seen)] != seen:
            yield f"{life.conid}: {brief(seen)}, sent {brief(sent)}"


def sent_and_seen(life, peer, until=float("inf")):
    """Return the good messages of a peer up to a byte, and those delivered;
    as one of both where the framing is raw."""
    marks = peer.marks[:peer.spoiled] if peer else []
    sent = [payload for end, payload in marks
            if end <= until]
    seen = life.messages
    if peer and peer.framing == "raw":
        sent, seen = b"".join(sent), b"".join(seen)
    if peer and peer.spoiled is not None:
        seen = seen[:len(sent)]
    return sent, seen


def brief(messages):
    if isinstance(messages, bytes):
        return f"{len(messages)} bytes"
    return f"{len(messages)} messages"


@invariant
def all_before_the_end_is_delivered(world):
    """What the peer sent before its FIN or RST is delivered before the end."""
    for life, event, peer, acts in each_end(world):
        if (peer is None or event.reason not in ("eof", "reset")
                or life.in_close):  # these do not read
            continue
        until = peer.floor if event.reason == "reset" else peer.wired + 0.5
        sent, seen = sent_and_seen(life, peer, until)
        if len(seen) < len(sent):
            yield (f"{life.conid}: {event.reason} after {brief(seen)},"
                   f" sent {brief(sent)}")


@invariant
def what_was_received_is_delivered(world):
    """Messages that the loop had received are delivered, or the end's detail
    says how many bytes were not.
    """
    for life, event, peer, acts in each_end(world):
        if peer is None or event.reason == "closed" or re.search(
                r"\d+ bytes (not delivered|undelivered)", event.detail):
            continue
        sent, seen = sent_and_seen(life, peer, event.bytes_in)
        if len(seen) < len(sent):
            yield (f"{life.conid}: {event.reason} ({event.detail}) after"
                   f" {brief(seen)}, received {brief(sent)}")


@invariant
def every_byte_taken_is_counted(world):
    """What send() took is in bytes_out or, at the end, in queued."""
    for life, event, peer, acts in each_end(world):
        if event.proto != "tcp" or not peer or event.origin == "connect" or (
                peer.framing not in ("raw", "sip")):  # forward may use lines
            continue
        ours = event.bytes_out + event.queued - life.taken  # the protocol's
        most = 4 * len(life.pings) + 2 * (peer.serial + len(peer.pongs))
        least = 4 * (len(life.pings) - ("RST" in acts))  # the last is lost
        if peer.framing == "raw" and ours or not least <= ours <= most:
            yield (f"{life.conid}: {life.taken} taken, {event.bytes_out} out,"
                   f" {event.queued} queued ({event.reason} {event.detail}),"
                   f" {len(life.pings)} pings")


@invariant
def the_peer_reads_what_was_sent(world):
    """A peer reads no more than bytes_out, and if it reads to the FIN at least
    bytes_out + queued - unsent: more where an acknowledgement was late.
    """
    for life, event, peer, acts in each_end(world):
        if peer is None or event.unsent is None or "steal" in life.odd:
            continue
        sent = event.bytes_out + event.queued - event.unsent
        if peer.read > event.bytes_out or peer.end == "FIN" and (
                peer.read < sent or event.queued and event.opened):
            yield (f"{life.conid}: read {peer.read} to the {peer.end}, sent"
                   f" {sent} ({event.reason}, {event.detail})")


@invariant
def we_say_goodbye(world):
    """Where we close, the peer has close_notify or a close frame before FIN.
    """
    for life, event, peer, acts in each_end(world):
        if peer is None or event.reason != "closed" or not event.opened or (
                acts & {"alert", "goodbye", "garbage", "long"}
                or peer.end != "FIN" or not peer.ready):
            continue
        if (event.proto in ("tls", "wss") and "heard close_notify" not in acts
                or event.proto in ("ws", "wss") and b"\x88" not in peer.tail):
            yield f"{life.conid} {event.proto}: the peer's {peer.tail}, {acts}"


@invariant
def nothing_is_left_over(world):
    """After close() there is no conid, descriptor, deadline or object."""
    ops = world.ops
    if ops._table.connections or ops._table.listeners or ops.conids():
        yield "conids"
    if ops._table._by_peer or ops._table.sockets or ops._table.crowded:
        yield f"in the table: {ops._table._by_peer}, {ops._table.sockets}"
    if ops._reactor.deadlines._heap:
        yield "deadlines"
    if world.left:
        yield f"descriptors {world.left}"
    for name, held in [*vars(ops._table).items()]:
        if held == {}:  # PyPy's may still hold values that were popped
            setattr(ops._table, name, {})
    gc.collect()
    found = objects() - world.objects
    if found:
        yield f"objects: {found}"


@invariant
def nothing_waits_for_the_collector(world):
    """Without the garbage collector, too, no object is left over."""
    if world.garbage and sys.implementation.name != "pypy":
        yield str(world.garbage)


# -- the witness -------------------------------------------------------------


OURS = {"closed", "shutdown", "lifetime", "protocol", "message", "connect",
        "send", "keepalive"}
#: The first terminal fact of the kernel: its name, and the reasons it allows.
VERDICTS = {"RST": ("RST received", {"reset"}),
            "CLOSE_WAIT": ("FIN received", {"eof"}),
            "FIN_WAIT1": ("our FIN", OURS - {"send"}),
            "CLOSE": ("our close", OURS),
            "error 110": ("error 110", {"keepalive", "send", "connect"}),
            "error 111": ("error 111", {"reset", "keepalive"})}


def judge(world, facts):
    """Return [(verdict, reason), ...] and the disagreements with the kernel.
    """
    table, bad = [], []
    for life, event, peer, acts in each_end(world):
        found = facts.get((event.Rp, event.sp), [])
        when, (name, allowed) = next((
            (when, VERDICTS[what]) for when, what in found
            if what in VERDICTS), (0, ("no record", set())))
        more = {"protocol"} if acts & {"garbage", "long", "alert"} or (
            event.proto in ("tls", "wss")) else set()
        more |= {"eof"} if "goodbye" in acts else set()
        if name == "RST received":  # it was sending its queue, or had others
            several = "several" in life.odd and not event.opened
            more |= {"closed"} if life.asked and (
                several or life.asked_at < when) else set()
            more |= {"shutdown"} if world.ended and (
                several or world.ended_at < when) else set()
        if name == "FIN received":
            more |= {"closed", "shutdown"} if life.asked else {"shutdown"}
        more |= {"error"} if "steal" in life.odd else set()
        table.append((name, event.reason))
        if found and event.reason not in allowed | more:
            bad.append(f"conid {life.conid} {event.proto}: kernel {name}, told"
                       f" {event.reason} ({event.detail}); {found}")
    for conid, start, end, state in world.states:
        bad += judge_state(world, facts, conid, start, end, state)
    return table, bad


def judge_state(world, facts, conid, start, end, state):
    """Yield what is wrong about an answer of tcp_conid_state."""
    life = world.lives.get(conid)
    if life is None or not life.ends or "steal" in life.odd:
        return
    event, kernel, reset = life.ends[0], None, False
    after_fin = "CLOSE_WAIT", "LAST_ACK"
    for when, what in facts.get((event.Rp, event.sp), ()):
        if start - 0.0005 < when < end + 0.0005:
            return  # at the same time
        if when < start:
            reset |= what == "RST" and kernel not in after_fin  # FIN decides
            kernel = what if what.isupper() and what != "RST" else kernel
    gone = world.times[conid][0] < start
    wanted = (None if kernel is None else
              {-1} if gone else {-3, -1} if reset
              else {-2, -1} if kernel in after_fin
              else {1, 2, 3, -1} if kernel in ("ESTABLISHED", "SYN_SENT")
              else {-1, -2, -3})
    if wanted and state not in wanted:
        yield f"state of {conid}: kernel {kernel}, answered {state}"
