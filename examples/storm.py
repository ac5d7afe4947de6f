"""A storm: random programs over all that tcpops can do, and hostile peers.

    python3 examples/storm.py --seeds 1-500             one program per seed
    python3 examples/storm.py --seeds 7-7 -v            its operations, in full
    python3 examples/storm.py --seeds 1-500 --witness   the kernel judges, too

Each seed is a program: operations from outside, and what its handlers do when
they are called.  The peers are ours, real sockets on the loopback that never
block; they talk, cut, drip, flood, answer pings or do not, stop reading,
half-close, reset and vanish, over each framing, plain and with TLS 1.2 and
1.3.  Time is a clock that jumps, also while a handler runs.  At the end each
function of INVARIANTS looks at what was seen.  The first program that breaks
one is shrunk and printed.

With --witness (root, Linux) the kernel's trace points say for each connection
which terminal fact came first, and for each answer of tcp_conid_state in which
state the socket was; vanished peers then take real seconds.
"""

if __name__ == "__main__":
    import quiet  # before the rest: it may be interrupted there

import argparse
import collections
import concurrent.futures
import contextlib
import gc
import importlib.util
import itertools
import logging
import multiprocessing.util
import os
import random
import re
import signal
import socket
import ssl
import sys
import time
import traceback
import types
from pathlib import Path

from kernel import Kernel
from storm_model import (INVARIANTS, SEEN, Seen, descriptors, each_end, judge,
                         objects)
from storm_peers import (JUMPS, NEVER, VERSIONS, Makers, attach_filter,
                         barrier, env, kernel_count, pinging, tick)

HERE = Path(__file__).resolve().parent
CERTIFICATE = str(HERE / "localhost.pem")
SECONDS = 10  #: of the processor's that a program may take; in all 6 times
SPIN = 30     #: turns in a row that may handle something and change nothing
#: The operations, and how often each is chosen.  The odd ones attach a socket
#: with an option set, or after close(); forget closes one that is attended.
OPS = {"listen": 3, "peer": 10, "serve": 3, "connect": 7, "accept": 2,
       "attach": 2, "attach_again": .5, "say": 16, "part": 4, "rest": 4,
       "garbage": 2, "fin": 4, "rst": 3, "shut": 3, "say_fin": 3,
       "say_rst": 3, "stuff": 5, "lull": 9,
       "pause": 3, "slow": 1, "resume": 4, "chat": 3, "vanish": .5, "back": 1,
       "call": 26, "clock": 8, "jump": 6, "run": 1, "drain": .5, "signal": .5,
       "close": .1, "set_tls": .5, "steal": .2, "attend": .2, "forget": .2,
       "odd_linger": .1, "odd_lowat": .1, "odd_cork": .1, "odd_shut": .1,
       "odd_blocking": .1, "odd_closed": .2, "odd_twice": .1}
#: The settings, and the values that programs choose from.
SETTINGS = {
    "connection_lifetime": [120, 120, 5, 30, 0.5], "connect_timeout": [10, 3],
    "send_timeout": [10, 3], "message_timeout": [20, 3, 60],
    "max_connections": [None, None, None, 4], "closed_event": [1, 1, 1, 0, 2],
    "max_message": [65536, 65536, 300, 7],
    "max_write_buffer": [1048576, 60000, 1000, 1]}
NONSENSE = [0, -1, 10 ** 9, "x", None, True, 1.5, b"1", [], "1.0"]
#: What a call may raise, other calls nothing.  RuntimeError: only where it is
#: closed, drained, or inside of a handler.
RAISES = {"listen": (OSError, RuntimeError),
          "connect": (OSError, RuntimeError),
          "attach": (OSError, RuntimeError, ValueError),
          "set_tls": (ValueError,), "modparam": (ValueError,),
          "event_route": (ValueError,), "call_soon": (RuntimeError,),
          "run": (RuntimeError,), "step": (RuntimeError, ValueError),
          "drain": (RuntimeError, ValueError), "set": (ValueError, TypeError),
          "attend": (ValueError, OSError), "dismiss": (KeyError, ValueError)}


class Hang(BaseException):
    """The alarm of a program that takes too long."""


class World(Makers, Seen):
    """One run of one program."""

    def __init__(self, seed, args, numbers=None):
        super().__init__(logging.WARNING)
        self.seed, self.args, self.numbers = seed, args, numbers
        r = random.Random(f"program {seed}")
        self.settings = {name: r.choice(values)
                         for name, values in SETTINGS.items()}
        if args.witness:
            self.settings.update(closed_event=1, max_connections=None)
        self.versions = VERSIONS
        self.tls = r.random() < 0.5
        self.batched = r.random() < 0.5
        self.routes = r.getrandbits(4)
        names = [name for name in OPS if name not in args.without]
        self.program = ["listen", "peer", *r.choices(
            names, [OPS[name] for name in names], k=args.operations)]
        self.story = []          # what was done, a line each
        self.wrong = collections.defaultdict(list)  # by invariant
        self.lives, self.peers, self.by_address = {}, [], {}
        self.listeners, self.servers, self.kept = {}, [], []
        self.low = dict(self.settings)  # the lowest value that each has had
        self.modes = {self.settings["closed_event"]}
        self.now, self.jump, self.busy = 1000.0, 0.0, []
        self.turn = self.now     # when the turn began
        self.pings = {"ping_interval": r.choice([NEVER, 1, 1, 5, 30]),
                      "ping_timeout": r.choice([0.5, 5, 10])}
        self.framings = {name: pinging(self, name, **self.pings)
                         for name in ("sip", "ws")
                         if name in env.tcpops.FRAMINGS}
        self.depth, self.inside, self.counts = 0, None, collections.Counter()
        self.ended, self.ended_at = None, 0.0  # first drain or close
        self.draining = self.drained = self.closed = self.hung = False
        self.mixed = False       # TLS versions may not agree
        self.leaving = self.progress = self.idle = self.at = 0
        self.states, self.times, self.messages = [], {}, {}
        self.began, self.used = time.monotonic(), time.process_time()

    def call(self, name, function, *args, wrong=False, **named):
        """Call what is public; note what it returned, or that it raised."""
        shown = ", ".join(f"{len(arg)} bytes" if isinstance(
            arg, (bytes, bytearray)) and len(arg) > 20 else
            getattr(arg, "__name__", None) or re.sub(" at 0x.*| fd=.*", "",
                                                     repr(arg))
            for arg in args)
        may = RAISES.get(name, ()) + (TypeError,) * wrong
        try:
            value = function(*args, **named)
        except Exception as error:
            value = None
            lawful = isinstance(error, may) and (
                type(error) is not RuntimeError or self.closed
                or self.draining or self.inside is not None)
            if not lawful:
                self.fault("calls_raise_what_is_documented", "".join(
                    traceback.format_exception(
                        type(error), error, error.__traceback__))[-1500:])
            self.tell(f"{name}({shown}) raises {error!r:.150}")
        except KeyboardInterrupt:
            value = None
            self.tell(f"{name}({shown}) is left by KeyboardInterrupt")
            if not self.leaving:
                self.fault("calls_raise_what_is_documented", name)
            self.leaving = max(0, self.leaving - 1)
        else:
            brief = value if isinstance(value, (int, type(None))) else "..."
            self.tell(f"{name}({shown}) -> {brief}")
        return value

    def anything(self, r, conid=None, msg=None, new=None):
        """Make one random call; conid is of the handler that runs, new of a
        connection that was just made.
        """
        ops, x = self.ops, r.random()
        known = ops.conids()
        one = (new or conid if (new or conid) and x < 0.4 else known[-1 - int(
            r.random() ** 2 * len(known))] if known and x < 0.9 else
            r.choice([*self.listeners, *NONSENSE, r.randrange(1, 40)]))
        c = () if conid and one == conid and r.random() < 0.5 else (
            str(one) if r.random() < 0.05 else one,)
        life = self.life(one) if one in known else None
        payload = r.choice([b"", b"hi", b"hello\n", "text", b"m" * 70,
                            bytearray(b"ba"), b"k" * 3000, b"K" * 200000, 5])
        peer = self.peers and r.random() < 0.8 and r.choice(self.peers)
        host, port = peer.addresses[0] if peer else r.choice(
            [("127.0.0.9", 9), *(s.address for s in self.servers)])
        address = r.choice([f"{host}:{port}"] * 5 + [f"sip:u@{host}:{port}",
                                                     "nonsense:x", 5])
        late = self.messages.get(one) if type(one) is int else None
        number, free = r.randrange(10 ** 6), self.inside is None
        setting = r.choice(list(SETTINGS))
        table = [
            ("tcp_conid_alive", 2, c), ("tcp_conid_state", 6, c),
            ("tcp_keepalive_enable", 3, (*c, *r.choice(
                [(60, 5, 5), ("60", "3", 7), (1, 1, 1), (0, 1, 1),
                 (40000, 1, 1), (9, 200, 1), (1,)]))),
            ("tcp_keepalive_disable", 1, c), ("tcp_enable_closed_event", 2, c),
            ("tcp_set_connection_lifetime", 4, (*c, r.choice(
                [0, 0.5, 3, 3, "10", 60, 2 ** 31 - 1, 2 ** 31, -1, "x"]))),
            ("tcp_close_connection", 5, c), ("send", 9, (one, payload)),
            ("tcp_get_conid", 3, (address,)), ("tcp_con_alive", 1, (address,)),
            ("forward", 3, (address, payload)),
            ("tcp_set_otcpid", 2 * bool(msg) + .1, (one,)),
            ("tcp_set_otcpid_flag", 2 * bool(msg) + .1,
             (r.choice([1, 0, "x"]),)),
            ("reply", 7 * bool(msg) + 2 * bool(late), (payload,)),
            ("connection", 3, (one,)), ("connections", 1, ()),
            ("listeners", .5, ()), ("stats", .5, ()), ("conids", .5, ()),
            ("modparam", .2, ("tcpops", "closed_event", 1)),
            ("set", 1, (ops, setting, r.choice(SETTINGS[setting]))),
            ("event_route", .3, (r.choice(["tcp:closed", "tcp:reset", "x"]),)),
            ("call_soon", 2, (self.soon, number)), ("stop", .3, ()),
            ("close", .05, ()), ("step", .2, (0,)), ("run", .2 * (not free),
                                                     ()),
            ("drain", .2 * (not free), (0,)), ("operate", 2 * (not free), ()),
            ("next_deadline", .5, ()), ("answer_and_close", one in known, ()),
            ("fileno", .1 * (not self.closed), ())]
        table = [row for row in table if row[0] not in self.args.without]
        name, _, args = r.choices(table, [row[1] for row in table])[0]
        if name == "answer_and_close":
            self.granted("send", self.life(one), (), b"K" * 200000 * (1 == (
                self.call("send", ops.send, one, b"K" * 200000))))
            name, args = "tcp_close_connection", (one,)
        if name == "operate":
            return self.operate(r.choice(["connect", "say", "listen", "fin",
                                          "attach_again",
                                          "rst", "peer"]), r)
        function = getattr(ops, name, None)
        if name == "reply":
            late = msg or late
            function, life = late.reply, self.life(late.conid)
        elif name == "set":
            if args[1] == "closed_event" and self.args.witness:
                return
            function = setattr
            self.setting(*args[1:])
        elif name == "event_route":
            function = lambda it: ops.event_route(it)(self.on_event) and None
        elif name == "modparam":
            self.modes.add(1)
        elif name == "close":
            self.ends_all()
            self.closed = True
        start, before = time.monotonic(), self.sent()
        value = self.call(name, function, *args, wrong=payload == 5)
        if name == "forward":
            for number, count in self.sent().items():
                self.life(number).taken += count - before.get(number, 0)
        if name == "tcp_conid_state" and type(one) is int and not (
                ops.event and ops.event.is_end and ops.conid == one):
            self.states.append((one, start, time.monotonic(), int(value)))
        if life is not None and value == 1:
            self.granted(name, life, args[len(c):], payload)
        self.check_call(name, args, value)

    def select(self, real):
        """Return a select for the loop which lets time pass and peers act."""
        def select(wait=None):
            self.pump()
            for peer in self.peers:
                peer.arrived = peer.wired - kernel_count(peer.sock, "waits")
            self.now, self.jump = self.now + self.jump, 0.0
            self.turn = self.now
            return real(0.002 if wait is None or wait > 0.002 else wait)
        return select

    def pump(self):
        moved = sum(self.accept(server) for server in self.servers
                    if server.mode == "auto")
        return moved + sum([peer.pump() for peer in self.peers])

    def step(self):
        """One step(0), and whether anything but an answer came of it."""
        reactor = self.ops._reactor
        if getattr(reactor._select, "__module__", "") != __name__:
            reactor._select = self.select(reactor._select)
        before = self.look()
        handled = self.call("step", self.ops.step, 0)
        self.story.pop()
        # One that lingers throws bytes away, which nothing shows.
        changed = self.look() != before or bool(self.ops._table.lingering)
        self.idle = 0 if changed or not handled else self.idle + 1
        if self.idle == SPIN:
            self.fault("no_spin", f"{handled} handled, and nothing changed")
        return changed

    def settle(self, limit=120):
        """Turn until neither the loop nor a peer has anything more to do."""
        quiet = turns = 0
        while quiet < 2 and turns < limit and not self.closed:
            barrier()
            moved = self.pump() + self.step()
            quiet, turns = 0 if moved else quiet + 1, turns + 1
        if quiet == 2 and limit == 120 and not self.closed:
            self.check_quiet()

    def run(self):
        """Run the program, end everything, and look at it."""
        fds, self.objects = descriptors(), objects()
        log = logging.getLogger("tcpops")
        log.addHandler(self)
        handler = signal.signal(signal.SIGUSR1, lambda *_: self.ops.stop())
        self.ops = env.tcpops.TcpOps(clock=lambda: self.now, **self.settings)
        try:
            signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
            self.go()
        except Hang:
            self.fault("no_hang", f"over {SECONDS} s\n{self.hung}")
        except Exception:
            self.fault("calls_raise_what_is_documented",
                       "in the storm itself?\n" + traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            log.removeHandler(self)
            for sock in [*(peer.sock for peer in self.peers), *self.kept,
                         *(server.sock for server in self.servers)]:
                sock.close()
            with contextlib.suppress(BaseException):
                self.ops.close()
            signal.signal(signal.SIGUSR1, handler)
        if self.hung:
            self.fault("no_hang", f"over {SECONDS} s\n{self.hung}")
            return
        self.messages.clear()
        self.left = descriptors() - fds
        self.garbage = objects() - self.objects
        for invariant in INVARIANTS:
            for text in invariant(self):
                self.fault(invariant.__name__, text)
        for name in self.args.without:
            self.wrong.pop(name, None)

    def go(self):
        ops = self.ops
        ops.request_route(self.on_message)
        if self.routes & 1:
            ops.onreply_route(lambda msg: self.on_message(msg, "answer"))
        for bit, name in enumerate(env.tcpops.EVENT_NAMES):
            if name in ("tcp:closed", "tcp:opened") or self.routes >> bit & 1:
                ops.event_route(name)(self.on_event)
        if self.routes == 8:
            ops.event_callback = self.on_callback
        for self.at, name in enumerate(self.program):
            if self.numbers is None or self.at in self.numbers:
                r = random.Random(f"{self.seed} {self.at}")
                self.operate(name, r)
                self.settle(r.choice([0, 0, 1, 2, 120] if self.batched
                                     else [120]))
        self.at = len(self.program)
        self.settle()
        self.ends_all()
        self.closed = True
        self.call("close", ops.close)
        for _ in range(3):
            while self.pump():
                barrier()
        self.stats = ops.stats()

    def operate(self, name, r):
        """Do one operation; those of a peer choose a young one."""
        peers = [peer for peer in self.peers if peer.sock.fileno() >= 0]
        if name.startswith("odd_"):
            return self.do_attach(r, name[4:])
        act = getattr(self, f"do_{name}", None)
        if act is not None:
            return act(r)
        if peers:
            peer = peers[-1 - int(r.random() ** 2 * len(peers))]
            self.tell(f"peer {peer.number} ({peer.framing}): {name}")
            self.act_of(peer, name, r)
            barrier()

    def act_of(self, peer, name, r):
        if name.startswith("say"):
            for _ in range(r.choice([1, 1, 1, 2, 12])):
                peer.say()
            peer.drip = r.choice([None] * 6 + [1, 7])
            peer.acts |= {"part"} if peer.drip else set()
        elif name == "part":
            peer.say(cut=True)
        elif name == "rest":
            peer.finish_part()
        elif name == "garbage" and peer.ready and "over" not in peer.acts:
            if peer.tls or peer.framing in ("sip", "ws"):
                peer.spoil("garbage")
                data = r.choice([b"\0" * 9, b"x" * 400, b"\x16\x03\x01", b"\r",
                                 b"GET / HTTP/1.1\r\n\r\n"])
                if peer.framing in ("sip", "ws") and r.random() < 0.5:
                    peer.put(data)
                else:
                    peer.wire += data
        elif name in ("pause", "slow", "resume"):
            peer.reads = {"pause": "none", "resume": "all"}.get(name, name)
            peer.acts.add(name)
        elif name == "chat":
            peer.chats = 30
        elif name in ("vanish", "back") and sys.platform == "linux":
            with contextlib.suppress(OSError):  # not root; no filter
                attach_filter(peer.sock, name == "vanish")
                peer.acts.add("vanish")
            if self.args.witness and name == "vanish":
                self.await_keepalive(peer)
        elif name == "stuff":
            peer.reads = "none"
            peer.acts.add("pause")
            data = b"s" * r.choice([1500000, 1500000, 150000])
            for life in self.lives.values():
                for _ in range(4 if life.peer is peer else 0):
                    if self.call(name, self.ops.send, life.conid, data) == 1:
                        self.granted("send", life, (), data)
            self.do_lull(r)
        peer.write()
        if name in ("fin", "say_fin", "shut", "rst", "say_rst"):
            barrier()
            peer.finish({"shut": "close"}.get(name, "RST" if "rst" in name
                                              else "FIN"))
            for life in self.lives.values():
                for _ in range(2 if life.peer is peer and r.random() < 0.3
                               else 0):  # an RST answers the first
                    if self.call("send", self.ops.send, life.conid, b"l") == 1:
                        life.taken += 1
                    barrier()

    def await_keepalive(self, peer):
        """Wait, in real seconds, until a vanished peer is found out."""
        for life in list(self.lives.values()):
            if life.peer is peer and not life.ends and self.call(
                    "tcp_keepalive_enable", self.ops.tcp_keepalive_enable,
                    life.conid, 1, 1, 1) == 1:
                self.granted("tcp_keepalive_enable", life, (1, 1, 1), b"")
                until = time.monotonic() + 4
                while not life.ends and time.monotonic() < until and (
                        not self.closed):
                    before = time.monotonic()
                    self.pump()
                    self.call("step", self.ops.step, 0.1)
                    self.story.pop()
                    self.jump += time.monotonic() - before

    def do_call(self, r):
        self.anything(r)

    def do_clock(self, r):
        self.jump += r.choice(JUMPS)
        self.tell(f"the clock jumps to {self.now + self.jump}")

    def do_jump(self, r):
        """Jump to the next deadline, or just before it."""
        if not self.closed:
            due = min([info.deadline for info in self.ops.connections()
                       if info.deadline is not None], default=0)
            self.jump = max(self.jump, due - self.now - r.choice([0, 0, 0.1]))
            self.tell(f"the clock jumps to {self.now + self.jump}")

    def do_lull(self, r):
        """Let the time of a ping or of a pong go by."""
        time = r.choice(list(self.pings.values()))
        if time < NEVER:
            self.jump += time
            self.tell(f"the clock jumps to {self.now + self.jump}")

    def do_run(self, r):
        if not self.closed:
            self.ops.call_soon(self.ops.stop)
        self.call("run", self.ops.run)

    def do_signal(self, r):
        os.kill(os.getpid(), signal.SIGUSR1)

    def do_drain(self, r):
        self.ends_all()
        before, self.draining = self.draining, True
        self.drained = True
        self.call("drain", self.ops.drain, r.choice([0, 0.01, 0.05]))
        self.draining = before

    def do_close(self, r):
        self.ends_all()
        self.closed = True
        self.call("close", self.ops.close)


# -- running -----------------------------------------------------------------


WORLD = None   #: the one that runs
KERNEL = None  #: of --witness


def start(args):
    """Make a process ready to run programs."""
    global KERNEL
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = importlib.util.spec_from_file_location("tcpops", args.file)
    env.tcpops = sys.modules["tcpops"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(env.tcpops)
    logging.getLogger("tcpops").propagate = False
    logging.getLogger("tcpops").addHandler(logging.NullHandler())
    if hasattr(os, "sched_setaffinity"):  # one core: what is sent has arrived
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    env.canary = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    env.canary.bind(("127.0.0.1", 0))
    env.canary.connect(env.canary.getsockname())
    for version in VERSIONS:
        for client in (False, True):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if client
                                     else ssl.PROTOCOL_TLS_SERVER)
            if client:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            else:
                context.load_cert_chain(CERTIFICATE)
            context.minimum_version = context.maximum_version = version
            env.tls[client, version] = context
    lookup = socket.getaddrinfo
    socket.getaddrinfo = lambda host, *more, **named: (
        [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
         for address in env.hosts] if host == "storm.test"
        else lookup(host, *more, **named))
    signal.signal(signal.SIGALRM, alarm)
    if args.witness:
        KERNEL = Kernel()
        multiprocessing.util.Finalize(None, KERNEL.close, exitpriority=1)
    gc.collect()
    gc.disable()
    if hasattr(gc, "freeze"):
        gc.freeze()


def alarm(_signal, frame):
    used = time.process_time() - WORLD.used
    if used < SECONDS and time.monotonic() < WORLD.began + 6 * SECONDS:
        return  # others have the processor
    WORLD.hung = WORLD.hung or "".join(traceback.format_stack(frame)[-6:])
    raise Hang


def play(seed, args, numbers=None):
    """Run the program of a seed, or some of its operations."""
    global WORLD
    WORLD = World(seed, args, numbers)
    WORLD.run()
    return WORLD


def shrink(seed, args, world):
    """Return a run of fewer operations which breaks the same invariant."""
    name, until = next(iter(world.wrong)), time.monotonic() + args.shrink
    numbers = sorted(world.numbers or range(len(world.program)))
    size = len(numbers) // 2
    while size and time.monotonic() < until:
        at = len(numbers) - size
        while at > -size and time.monotonic() < until:
            fewer = numbers[:max(at, 0)] + numbers[at + size:]
            trial = play(seed, args, set(fewer))
            if trial.wrong.get(name):
                numbers, world = fewer, trial
            at -= size
        size //= 2
    return world


def report(seed, args, world):
    """Return the text that shows a program, and how to run it again."""
    lines = [f"seed {seed}, {world.settings}", *world.story]
    for name, found in world.wrong.items():
        sentence = " ".join(SEEN[name].split())
        lines += [f"BROKEN: {name}: {sentence}", *found[:3]]
    if world.wrong:
        again = f"python3 examples/storm.py --seeds {seed}-{seed} -v"
        some = world.numbers is not None and sorted(world.numbers)
        lines.append("again: " + again + (
            f" --only {','.join(map(str, some))}" if some else "") + "".join(
            f" --{word} {value}" for word, value in args.given.items()))
    return "\n".join(lines)


def try_seed(seed, args):
    """Run a seed; return what the summary needs."""
    if env.tcpops is None:
        start(args)
    numbers = args.only or (set(range(args.steps)) if args.steps else None)
    world = play(seed, args, numbers)
    result = types.SimpleNamespace(
        seed=seed, lives=len(world.lives), text="", names=list(world.wrong),
        operations=len(world.program if numbers is None else numbers),
        reasons=[event.reason for _, event, _, _ in each_end(world)],
        table=[], bad=[])
    if KERNEL:
        result.table, result.bad = judge(world, KERNEL.take())
    if world.wrong:
        if args.shrink:
            world = shrink(seed, args, world)
        result.text = report(seed, args, world)
    elif args.v:
        result.text = report(seed, args, world)
    result.bad = [f"seed {seed}: {text}" for text in result.bad]
    return result


def numbers(text):
    """Return (first, last) of "A-B"."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"A-B is needed, not {text!r}")
    return int(match[1]), int(match[2] or match[1])


def names_of(text):
    """Return a set of names that can be left out."""
    names, known = set(text.split(",")), {
        *OPS, *SEEN, "close"}
    if names - known:
        raise argparse.ArgumentTypeError(
            f"no operation or invariant: {', '.join(names - known)}")
    return names


def at_least_one(text):
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"1 or more is needed, not {text!r}")
    return int(text)


def arguments(argv):
    """Return the arguments; a wrong one is a line, and status 2."""
    parser = argparse.ArgumentParser(
        usage="storm.py [--seeds A-B] [--jobs N] [--steps K] [--witness] ...",
        description=__doc__.split("\n")[0])
    parser.error = lambda text: parser.exit(2, f"storm.py: {text}\n")
    add = parser.add_argument
    add("--seeds", type=numbers, default=(1, 100), metavar="A-B")
    add("--jobs", type=at_least_one, default=1, metavar="N",
        help="so many processes")
    add("--operations", type=at_least_one, default=40, metavar="N",
        help="of each program")
    add("--steps", type=at_least_one, metavar="K",
        help="run the first K operations only")
    add("--only", type=lambda text: set(map(int, text.split(","))),
        metavar="N,N", help="run these operations only")
    add("--without", type=names_of, default=set(), metavar="NAME,NAME",
        help="leave out these operations, calls or invariants")
    add("--file", default=str(HERE.parent / "tcpops.py"), metavar="PATH",
        help="another copy of tcpops.py")
    add("--shrink", type=int, default=10, metavar="S",
        help="seconds for the search of a shorter program")
    add("--most", type=at_least_one, metavar="N", help="end after N failures")
    add("--witness", action="store_true", help="the kernel judges; needs root")
    add("-v", action="store_true", help="print every program")
    args = parser.parse_args(argv)
    if not os.path.isfile(args.file):
        parser.error(f"there is no file {args.file}")
    if args.witness:
        try:
            Kernel().close()
        except OSError as error:
            parser.error(f"--witness needs root, Linux and tracefs: {error}")
    args.given = {name: value for name, value in (
        ("without", ",".join(sorted(args.without))),
        ("file", args.file != parser.get_default("file") and args.file),
        ("operations", args.operations != 40 and args.operations)) if value}
    return args


def summary(args, done, reasons, table, failed, bad, seconds):
    """Print what all the programs came to; return the status."""
    for (name, reason), count in sorted(table.items()):
        print(f"  {name:14} {reason:10} {count}")
    if bad:
        print(*bad[:20], sep="\n")
    names = collections.Counter(name for names in failed.values()
                                for name in names)
    for name, count in names.most_common():
        print(f"  {count:5} broke {name}, seeds",
              *[seed for seed in failed if name in failed[seed]][:5])
    print(f"{done['seeds']} seeds, {done['operations']} operations,"
          f" {done['lives']} lives ("
          + ", ".join(f"{reason} {count}" for reason, count
                      in reasons.most_common())
          + f"), {seconds:.0f} s, {len(failed)} failures"
          + f", {len(bad)} disagreements" * args.witness)
    return 1 if failed or bad else 0


def main(argv=None):
    args = arguments(argv)
    done, reasons, table = (collections.Counter() for _ in range(3))
    failed, bad, began = {}, [], time.monotonic()
    first, last = args.seeds
    pool = concurrent.futures.ProcessPoolExecutor(args.jobs)
    try:
        seeds = iter(range(first, last + 1))
        running = {pool.submit(try_seed, seed, args)
                   for seed in itertools.islice(seeds, 2 * args.jobs)}
        while running:
            ready, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED)
            for result in sorted((it.result() for it in ready),
                                 key=lambda it: it.seed):
                done.update(seeds=1, operations=result.operations,
                            lives=result.lives)
                reasons.update(result.reasons)
                table.update(result.table)
                bad += result.bad
                if result.names:
                    failed[result.seed] = result.names
                if result.text:
                    print(result.text, end="\n\n", flush=True)
            if not args.most or len(failed) < args.most:
                running |= {pool.submit(try_seed, seed, args)
                            for seed in itertools.islice(seeds, len(ready))}
            if sys.stderr.isatty():
                print(f"\r{done['seeds']} of {last - first + 1} seeds,"
                      f" {len(failed)} failures", end="", file=sys.stderr)
        pool.shutdown()
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        return 130
    finally:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
    return summary(args, done, reasons, table, failed, bad,
                   time.monotonic() - began)


if __name__ == "__main__":
    raise SystemExit(main())
