"""Conformance: the specification's demands, and the answers of real systems.

    python3 examples/conformance.py                  tcpops beside Kamailio
    python3 examples/conformance.py --only 3.5       one section of it
    python3 examples/conformance.py --markdown       the table for a document
    python3 examples/conformance.py --must-pass mine \
        --system mine=192.0.2.1:5060 --system mine:never=192.0.2.1:5061 \
        --system mine:manual=192.0.2.1:5062         another system

Each scenario speaks to the systems over the wire only.  tcpops is the small
program below (Subject), Kamailio is the real one with conformance.cfg, if it
is installed (Debian: apt-get install --no-install-recommends kamailio
iproute2).  A run takes half a minute: the original takes its time over a
lifetime.  It makes, and removes again, a network namespace with a pair of
interfaces (in 10.0.0.0/8) for each system that it starts, for the host that
vanishes with its cable.  That needs root; anybody else is root in a network
of their own (vanish.py) as long as nothing is asked at an address, or skips
those that need it.

Any other system can be asked if it answers SIP requests at one IPv4 address,
over TCP and over UDP, as follows.  A request is an OPTIONS with headers:

    X-Ask      the request: one of the specification's functions by its name,
               tcp_close_connection, or one of:
      conid          answer the $conid of this very message
      tcp_get_conid  answer the conid of a connection with the address X-1,
                     -1 if there is none; one that does not stand yet counts.
                     Much is asked by its help
      forward        send this request to the address X-1 over TCP, on a
                     connection with it if there is one, and answer 1; with
                     X-Otcpid on that conid (tcp_set_otcpid and its flag).
                     X-Conid names the connection, for a system that does not
                     take by itself one that its peer has ended
      event          answer the argument of the X-1st call of an event route,
                     counted from 1: the route's name (tcp:closed,
                     tcp:reset, tcp:timeout), $conid $proto $si $sp $Ri $Rp,
                     with blanks between; 0 if it has not come yet
      listener       answer the conid of the socket that accepts
      broken         bring a connection's socket into an unknown bad state,
                     answer tcp_conid_state's value
      example 1.4    answer tcp_keepalive_enable("60", "5", "5")
      example 1.6    answer tcp_set_connection_lifetime("3605")
      answer, then tcp_close_connection
                     answer 1, then call that without conid
    X-Conid    the conid to pass; without it, call the form that has none
    X-1 to X-3 the other arguments, in the function's order
    X-Type     "string" if X-Conid and the arguments of a function of the
               specification are passed as the strings they are; else they are
               made numbers first: the digits at the start, 0 without any
    X-Delay    microseconds for which the script sleeps first, and whoever
               else depends on it with it

The answer is a 200 with the request's Via, From, To, Call-ID and CSeq, and the
result in X-Result; "unknown" says that there is no such function, or form of
it.  A response, 200, with these X- headers does the same in the onreply_route
and has no answer.  Timeouts for connect, send and an incomplete message are
3 s; bytes that are no SIP end their connection.

closed_event is fixed when a system starts, so a system is several of them, one
for each of MODES: NAME:MODE=HOST:PORT; scenarios of a mode that has no address
are skipped.  alone has no event_route but tcp:closed and a default lifetime of
4 s, all others one of 120 s.  busy is as always; one address may serve both,
if it is nobody's misfortune that its script sleeps for a while.

Exit status: 1 if the system of --must-pass differs from a demand, or
if tcpops and Kamailio differ otherwise than GROUPS says.
"""

if __name__ == "__main__":
    import quiet  # before the rest: it may be interrupted there

import argparse
import collections
import concurrent.futures
import contextlib
import ctypes
import functools
import itertools
import json
import os
import random
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tcpops
import vanish as vanishing

HERE = Path(__file__).resolve().parent
#: The processes of a system: {mode: (closed_event, the default lifetime,
#: whether event_route[tcp:closed] is the only one)}.
MODES = {"always": (1, 120, False), "never": (0, 120, False),
         "manual": (2, 120, False), "alone": (1, 4, True),
         "busy": (1, 120, False)}
COUNTER = itertools.count(1)


def fields(head):
    """Return the headers of a SIP message, {name in lower case: value}."""
    found = re.findall(r"^([\w-]+)[ \t]*:[ \t]*(.*?)[ \t]*\r?$", head, re.M)
    return {name.lower(): value for name, value in reversed(found)}

# -- the system under test that is made with tcpops ---------------------------


class Subject:
    """Answers as the text above says."""

    #: How many arguments a function has beside the conid.
    ARGUMENTS = {"tcp_keepalive_enable": 3, "tcp_set_connection_lifetime": 1,
                 "tcp_get_conid": 1, "tcp_conid_alive": 0,
                 "tcp_conid_state": 0, "tcp_keepalive_disable": 0,
                 "tcp_enable_closed_event": 0, "tcp_close_connection": 0}

    def __init__(self, mode, port, *hosts):
        closed_event, lifetime, alone = MODES[mode]
        self.address = hosts[0], port
        self.ops = tcpops.TcpOps(
            closed_event=closed_event, connection_lifetime=lifetime,
            connect_timeout=3, send_timeout=3, message_timeout=3)
        self.events = []
        self.ops.request_route(self.on_request)
        self.ops.onreply_route(self.on_reply)
        for route in ["tcp:closed"] + ([] if alone else ["tcp:reset",
                                                          "tcp:timeout"]):
            self.ops.event_route(route)(functools.partial(self.note, route))
        self.listeners = [self.ops.listen(host, port, framing="sip")
                          for host in hosts]

    def note(self, route, event):
        self.events.append(" ".join(map(str, (
            route, self.ops.conid, event.proto, event.si, event.sp, event.Ri,
            event.Rp))))

    def on_request(self, msg):
        msg.reply(self.answer(msg.data))
        if msg.header("X-Ask") == "answer, then tcp_close_connection":
            self.ops.tcp_close_connection()

    def on_reply(self, msg):
        self.answer(msg.data)

    def answer(self, message):
        """Do as a message asks; return the answer."""
        headers = fields(message.decode("utf-8", "replace").partition(
            "\r\n\r\n")[0])
        time.sleep(int(headers.get("x-delay", 0)) / 1e6)
        lines = ["SIP/2.0 200 OK", *(
            f"{name}: {headers.get(name, '')}"
            for name in ("via", "from", "to", "call-id", "cseq")),
            f"X-Result: {self.result(headers, message)}",
            "Content-Length: 0", "", ""]
        return "\r\n".join(lines).encode()

    def result(self, headers, message):
        """Return the value for X-Result."""
        ask = headers.get("x-ask")
        if ask in self.ARGUMENTS:
            return int(self.call(ask, headers))
        if ask == "conid":
            return self.ops.conid or 0
        if ask == "listener":
            return self.listeners[0]
        if ask == "event":
            number = self.number(headers.get("x-1"))
            return (self.events[number - 1]
                    if 0 < number <= len(self.events) else 0)
        if ask == "forward":
            return int(self.forward(headers, message))
        if ask == "broken":
            return int(self.broken())
        if ask == "example 1.4":
            return int(self.ops.tcp_keepalive_enable("60", "5", "5"))
        if ask == "example 1.6":
            return int(self.ops.tcp_set_connection_lifetime("3605"))
        return 1 if ask == "answer, then tcp_close_connection" else "unknown"

    @staticmethod
    def number(text):
        digits = re.match("-?[0-9]+", text or "")
        return int(digits[0]) if digits else 0

    def call(self, name, headers):
        """Call one of the specification's functions."""
        keys = (["x-conid"] if "x-conid" in headers else []) + [
            f"x-{n}" for n in range(1, self.ARGUMENTS[name] + 1)]
        values = [headers.get(key, "") for key in keys]
        if headers.get("x-type") != "string" and name != "tcp_get_conid":
            values = [self.number(value) for value in values]
        return getattr(self.ops, name)(*values)

    def forward(self, headers, message):
        if "x-conid" in headers:
            return self.ops.send(self.number(headers["x-conid"]), message)
        if "x-otcpid" in headers:
            self.ops.tcp_set_otcpid(headers["x-otcpid"])
            self.ops.tcp_set_otcpid_flag(1)
        return self.ops.forward(headers.get("x-1", ""), message)

    def broken(self):
        """Close a socket behind the loop's back."""
        with socket.create_server((self.address[0], 0)) as server, \
                socket.create_connection(server.getsockname()) as sock:
            conid = self.ops.attach(sock)
        return self.ops.tcp_conid_state(conid)

    def run(self):
        """Have another loop, which has a UDP socket, drive ours: a request
        by that comes from outside of any TCP message.
        """
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, \
                selectors.DefaultSelector() as selector:
            udp.bind(self.address)
            udp.setblocking(False)
            selector.register(udp, selectors.EVENT_READ)
            selector.register(self.ops.fileno(), selectors.EVENT_READ)
            while True:
                due = self.ops.next_deadline()
                selector.select(due and max(0, due - time.monotonic()))
                self.ops.step(0)
                with contextlib.suppress(BlockingIOError):
                    data, peer = udp.recvfrom(65536)
                    udp.sendto(self.answer(data), peer)

# -- systems ------------------------------------------------------------------


class Skip(Exception):
    """A scenario cannot be had here; the text says why."""


class Event(NamedTuple):
    """A system's report of the end of a connection."""
    name: str
    conid: str
    proto: str
    si: str
    sp: str
    Ri: str
    Rp: str


class Client:
    """Speaks SIP to a system: over a connection, or over UDP."""

    def __init__(self, sock):
        self.sock = sock
        self.name = sock.getsockname()[:2]
        self.udp = sock.type == socket.SOCK_DGRAM
        self.text = ""

    def request(self, ask, *arguments, conid=None, strings=False,
                response=False, **headers):
        """Return (the bytes that ask, the Call-ID of the answer)."""
        call = f"{next(COUNTER)}@{self.name[0]}"
        lines = [
            "SIP/2.0 200 OK" if response else
            "OPTIONS sip:conformance@127.0.0.1 SIP/2.0",
            f"Via: SIP/2.0/{'UDP' if self.udp else 'TCP'} {self.name[0]}:"
            f"{self.name[1]};branch=z9hG4bK{call[:-len(self.name[0]) - 1]}",
            "Max-Forwards: 70", "From: <sip:suite@127.0.0.1>;tag=1",
            "To: <sip:conformance@127.0.0.1>", f"Call-ID: {call}",
            "CSeq: 1 OPTIONS", f"X-Ask: {ask}"]
        if conid is not None:
            lines.append(f"X-Conid: {conid}")
        lines += [f"X-{number}: {argument}"
                  for number, argument in enumerate(arguments, 1)]
        if strings:
            lines.append("X-Type: string")
        lines += [f"X-{name.title()}: {value}"
                  for name, value in headers.items()]
        lines += ["Content-Length: 0", "", ""]
        return "\r\n".join(lines).encode(), call

    def ask(self, ask, *arguments, **how):
        """Ask, return the result, "no answer" or "closed"."""
        data, call = self.request(ask, *arguments, **how)
        try:
            self.sock.sendall(data)
        except OSError:
            return "closed"
        return self.answer(call, how.get("delay", 0) / 1e6)

    def answer(self, call, delay=0):
        """Return the result that came in answer.

        Where none comes, something else is asked: a system that answers that,
        and has not answered this, never will.
        """
        found = self.receive(call, 0.7 + delay)
        if found is None:
            data, other = self.request("conid")
            with contextlib.suppress(OSError):
                self.sock.sendall(data)
            found = self.receive(call, 5, other)
        return found or "no answer"

    def receive(self, call, patience, instead=None):
        """Return the result for one Call-ID, None if it does not come."""
        end = time.monotonic() + patience
        while True:
            while "\r\n\r\n" in self.text:
                head, _, self.text = self.text.partition("\r\n\r\n")
                headers = fields(head)
                if not head.lstrip().startswith("SIP/2.0 200"):
                    continue
                if headers.get("call-id") == call:
                    return headers.get("x-result", "")
                if headers.get("call-id") == instead:
                    return None
            self.sock.settimeout(max(0.001, end - time.monotonic()))
            try:
                data = self.sock.recv(65536)
            except socket.timeout:
                return None
            except OSError:
                return "closed"
            if not data:
                return "closed"
            self.text += data.decode()

    @functools.cached_property
    def conid(self):
        return self.ask("conid")

    def talk(self):
        """Send a message, and have it answered."""
        return self.ask("conid")

    def wait(self, patience):
        """Return the time at which the system has closed, None if never."""
        end = time.monotonic() + patience
        with contextlib.suppress(OSError):
            while True:
                self.sock.settimeout(max(0.001, end - time.monotonic()))
                try:
                    if not self.sock.recv(65536):
                        break
                except socket.timeout:
                    return None
        return time.monotonic()


class System:
    """One process of a system under test, in one of the modes."""

    def __init__(self, address):
        self.address = address
        self.events = []
        self.asked = 0
        self.lock = threading.Lock()
        self.busy = threading.Lock()  # held while its script is kept busy
        self.udp = None

    def check(self, name):
        """Exit if nobody is there who answers."""
        try:
            with socket.create_connection(self.address, 5) as sock:
                answer = Client(sock).ask("conid")
        except OSError as error:
            answer = error
        if not str(answer).isdigit():
            raise SystemExit("%s at %s:%d does not answer as it must: %s" % (
                name, *self.address, answer))

    def fetch(self):
        """Ask for the events that are new; return all."""
        with self.lock:
            if self.udp is None:
                self.udp = Client(socket.socket(socket.AF_INET,
                                                socket.SOCK_DGRAM))
                self.udp.sock.connect(self.address)
                self.udp.name = self.udp.sock.getsockname()
            while time.monotonic() > self.asked + 0.02:
                words = self.udp.ask("event", len(self.events) + 1).split()
                if len(words) != len(Event._fields):
                    self.asked = time.monotonic()
                else:
                    self.events.append(Event(*words))
            return [*self.events]

    def end(self):
        if self.udp is not None:
            self.udp.sock.close()


class Net:
    """A host on a cable of its own: a network namespace with a veth pair."""

    def __init__(self, number):
        tag = os.getpid() * 10 + number
        self.name, self.link = f"tcpops{tag}", f"tops{tag % 10 ** 8}"
        net = f"10.{100 + tag % 100}.{tag // 100 % 250}"
        self.ours, self.theirs = f"{net}.1", f"{net}.2"
        self.reason = ""
        self.lock = threading.Lock()  # one scenario at a time pulls the cable
        try:
            self.make()
        except (OSError, subprocess.CalledProcessError) as error:
            self.end()
            self.reason = ("no network namespace can be made (is this root,"
                           f" with iproute2?): {error}")

    def make(self):
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", self.link, "type", "veth", "peer", "name",
            "inner", "netns", self.name)
        run("ip", "addr", "add", f"{self.ours}/24", "dev", self.link)
        run("ip", "link", "set", self.link, "up")
        run("ip", "-n", self.name, "addr", "add", f"{self.theirs}/24", "dev",
            "inner")
        run("ip", "-n", self.name, "link", "set", "inner", "up")

    def connect(self, port):
        """Return a socket of that host, connected to ours."""
        if self.reason:
            raise Skip(self.reason)
        with open("/proc/thread-self/ns/net") as home, open(
                f"/run/netns/{self.name}") as there:
            if LIBC.setns(there.fileno(), 0):
                raise Skip("setns: " + os.strerror(ctypes.get_errno()))
            try:
                return socket.create_connection((self.ours, port), 5)
            finally:
                LIBC.setns(home.fileno(), 0)

    @contextlib.contextmanager
    def host(self, port):
        """Yield (a client on that host, what pulls its cable out)."""
        def cable(way):
            run("ip", "-n", self.name, "link", "set", "inner", way)
        with self.lock, self.connect(port) as sock:
            try:
                yield Client(sock), lambda _: cable("down")
            finally:
                cable("up")

    def end(self):
        for command in (("ip", "netns", "del", self.name),
                        ("ip", "link", "del", self.link)):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                run(*command)


def run(*command):
    subprocess.run(command, check=True, capture_output=True)


LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_us():
    """In a child: have the kernel end it when its parent has ended."""
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def free_port(host):
    """Return a port that is free for TCP and UDP, out of those that the kernel
    gives to nobody who connects.
    """
    for port in random.sample(range(10000, 30000), 1000):
        with contextlib.suppress(OSError), socket.socket() as tcp, \
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            tcp.bind((host, port))
            udp.bind((host, port))
            return port
    raise SystemExit(f"no port is free on {host}")


class Started(System):
    """One that the suite has started itself."""

    def __init__(self, name, mode, folder, hosts):
        super().__init__((hosts[0], free_port(hosts[0])))
        self.log = open(Path(folder) / f"{name}-{mode}.log", "w+")
        self.process = subprocess.Popen(
            COMMANDS[name](mode, self.address[1], hosts, folder),
            stdout=self.log, stderr=subprocess.STDOUT, preexec_fn=die_with_us,
            start_new_session=True)  # Ctrl-C is for us

    def wait(self):
        """Wait until it answers."""
        end = time.monotonic() + 20
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(
                    self.address, 1) as sock:
                if Client(sock).ask("conid").isdigit():
                    return
            time.sleep(0.05)
        self.log.seek(0)
        raise SystemExit(f"{' '.join(self.process.args)}: does not answer\n"
                         + self.log.read()[-2000:])

    def end(self):
        super().end()
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def tcpops_command(mode, port, hosts, folder):
    return [sys.executable, __file__, "--serve", mode, str(port), *hosts]


def kamailio_command(mode, port, hosts, folder):
    closed_event, lifetime, alone = MODES[mode]
    listen = [f"tcp:{host}:{port}" for host in hosts]
    return [shutil.which("kamailio"), "-DD", "-E",
            "-f", str(HERE / "conformance.cfg"), "-m", "64", "-M", "8",
            "-Y", folder, *itertools.chain.from_iterable(
                ("-l", one) for one in [*listen, f"udp:{hosts[0]}:{port}"]),
            "-A", f"MODE={closed_event}", "-A", f"LIFETIME={lifetime}",
            *(["-A", "ALONE"] if alone else [])]


COMMANDS = {"tcpops": tcpops_command, "kamailio": kamailio_command}

# -- the tools of a scenario --------------------------------------------------


class Lab:
    """One scenario with one system: its sockets end with it."""

    def __init__(self, system, number, net):
        self.system = system
        self.net = net
        self.socks = []
        #: An address for each scenario: its events are told from all
        #: others' by it.
        self.source = f"127.{100 + number // 250}.{number % 250}.1"
        self.local = system.address[0].startswith("127.")
        self.note = ""

    def keep(self, sock):
        self.socks.append(sock)
        return sock

    def client(self, buffer=None):
        """Connect, and say nothing yet; buffer is SO_RCVBUF in bytes."""
        sock = self.keep(socket.socket())
        sock.settimeout(5)
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        if self.local:
            sock.bind((self.source, 0))
        sock.connect(self.system.address)
        return Client(sock)

    def udp(self):
        sock = self.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.connect(self.system.address)
        return Client(sock)

    def listener(self, backlog=5):
        """A place to which the system can be told to connect."""
        if not self.local:
            raise Skip("the system could not connect to us")
        return self.keep(socket.create_server((self.source, 0),
                                              backlog=backlog))

    def outgoing(self):
        """Have the system connect to us; return (our side, who asked)."""
        listener, asker = self.listener(), self.client()
        asker.ask("forward", "%s:%d" % listener.getsockname())
        listener.settimeout(5)
        client = Client(self.keep(listener.accept()[0]))
        client.sock.recv(65536)  # the message forwarded
        client.name = listener.getsockname()
        return client, asker

    def deaf(self):
        """Have the system connect where nobody answers; return (our side, who
        asked).  The backlog is full: the kernel there drops the SYN.
        """
        listener, asker = self.listener(0), self.client()
        for _ in range(2):
            sock = self.keep(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        asker.ask("forward", "%s:%d" % listener.getsockname())
        return Client(listener), asker

    def silent(self):
        """Return (a client that has sent nothing, its conid)."""
        client = self.client()
        return client, self.client().ask("tcp_get_conid",
                                         "%s:%d" % client.name)

    def end(self):
        for sock in self.socks:
            sock.close()

    def ends(self, client):
        return [event for event in self.system.fetch()
                if (event.si, event.sp) == (client.name[0],
                                            str(client.name[1]))]

    def told(self, client, patience=3):
        """Return the names of the events of a connection, or "no event".

        After the first, one that should not be has a little time to come.
        """
        end = time.monotonic() + patience
        while time.monotonic() < end and not self.ends(client):
            time.sleep(0.02)
        time.sleep(0.2)
        return (", ".join(event.name for event in self.ends(client))
                or "no event")

    def ended(self, client, patience=15):
        """Say whether the system has forgotten a connection, or does soon."""
        asker, end = self.client(), time.monotonic() + patience
        while asker.ask("tcp_conid_state", conid=client.conid) != "-1":
            if time.monotonic() > end:
                return "lives"
            time.sleep(0.1)
        return "ended"

    def timer(self, client):
        """Return a connection's timer, as the system's kernel has it, in
        tens of seconds or minutes: it has run for a while when it is read.
        """
        if not self.local:
            raise Skip("the system's kernel is not ours")
        if not shutil.which("ss"):
            raise Skip("there is no ss here (Debian: iproute2)")
        end = time.monotonic() + 2
        while True:
            shown = subprocess.run(
                ["ss", "-Htno", "state", "established", "dst",
                 "%s:%d" % client.name], capture_output=True,
                text=True).stdout
            # "on": an answer is not acknowledged yet, that comes first.
            if "timer:(on" not in shown or time.monotonic() > end:
                break
        timer = re.search(r"timer:\(keepalive,([\d.]+)(\w+)", shown)
        if not timer:
            return "no keepalive" if shown else "no connection"
        self.note = f"ss: {timer[1]}{timer[2]}"
        seconds = float(timer[1]) * {"ms": .001, "sec": 1, "min": 60}.get(
            timer[2], float("nan"))
        if seconds > 600:
            return f"about {-(-seconds // 600) * 10:.0f} min"
        return f"about {-(-seconds // 10) * 10:.0f} s"


def reset(client):
    """Close with an RST."""
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                           struct.pack("ii", 1, 0))
    client.sock.close()


def vanish(client):
    """Have our kernel drop whatever comes for this socket."""
    try:
        vanishing.vanish(client.sock)
    except PermissionError:
        raise Skip("only root may have a socket drop all that comes in here")


class Scenario(NamedTuple):
    """A question, and the answer that the specification demands."""
    clause: str
    what: str
    demand: str
    mode: str
    play: Callable
    slow: bool

    @property
    def key(self):
        return f"{self.clause} {self.what}"


SCENARIOS = []


def add(clause, what, demand, play, mode="always", slow=False):
    SCENARIOS.append(Scenario(clause, what, str(demand), mode, play, slow))


def scenario(clause, what, demand, mode="always", slow=False):
    def decorate(play):
        add(clause, what, demand, play, mode, slow)
        return play
    return decorate


# -- 3: each function and form, from each place -------------------------------

#: Each function with arguments that it accepts.
FUNCTIONS = {
    "tcp_conid_alive": ("3.1", ()), "tcp_conid_state": ("3.2", ()),
    "tcp_keepalive_enable": ("3.3", (60, 5, 7)),
    "tcp_keepalive_disable": ("3.4", ()),
    "tcp_set_connection_lifetime": ("3.5", (60,)),
    "tcp_enable_closed_event": ("3.6", ()),
}


def own(name, arguments, **how):
    return lambda lab: lab.client().ask(name, *arguments, **how)


def own_conid(name, arguments, **how):
    def play(lab):
        client = lab.client()
        return client.ask(name, *arguments, conid=client.conid, **how)
    return play


def other(name, arguments):
    def play(lab):
        return lab.client().ask(name, *arguments, conid=lab.client().conid)
    return play


def other_udp(name, arguments):
    def play(lab):
        return lab.udp().ask(name, *arguments, conid=lab.client().conid)
    return play


def outside(name, arguments):
    return lambda lab: lab.udp().ask(name, *arguments)


def silent(name, arguments):
    def play(lab):
        client, conid = lab.silent()
        return lab.client().ask(name, *arguments, conid=conid)
    return play


def connected(name, arguments):
    def play(lab):
        client, asker = lab.outgoing()
        return asker.ask(name, *arguments, conid=client.conid)
    return play


def own_outgoing(name, arguments):
    return lambda lab: lab.outgoing()[0].ask(name, *arguments)


def connecting(name, arguments):
    def play(lab):
        peer, asker = lab.deaf()
        conid = asker.ask("tcp_get_conid", "%s:%d" % peer.name)
        return asker.ask(name, *arguments, conid=conid)
    return play


def gone(name, arguments):
    def play(lab):
        client = lab.client()
        conid = client.conid
        client.sock.close()
        lab.told(client)
        return lab.client().ask(name, *arguments, conid=conid)
    return play


for name, (clause, arguments) in FUNCTIONS.items():
    mode = "manual" if name == "tcp_enable_closed_event" else "always"
    for what, demand, play in (
            ("in a message, without conid", 1, own(name, arguments)),
            ("in a message, its own conid", 1, own_conid(name, arguments)),
            ("in a message, another's conid", 1, other(name, arguments)),
            ("outside of TCP, by conid", 1, other_udp(name, arguments)),
            ("outside of TCP, without conid", -1, outside(name, arguments)),
            ("an accepted connection that has been silent",
             2 if name == "tcp_conid_state" else 1, silent(name, arguments)),
            ("an outgoing connection that stands", 1,
             connected(name, arguments)),
            ("in a message of an outgoing connection, without conid", 1,
             own_outgoing(name, arguments)),
            ("an outgoing connection that does not stand yet",
             3 if name == "tcp_conid_state" else 1,
             connecting(name, arguments)),
            ("a connection that has ended", -1, gone(name, arguments)),
            *((f"conid {conid}", -1,
               own(name, arguments, conid=conid))
              for conid in (0, -5, 999999, 2 ** 31 - 1, 2 ** 40)),
            ("conid and arguments as strings", 1,
             own_conid(name, arguments, strings=True)),
            ("a word for the conid", -1,
             own(name, arguments, conid="word", strings=True))):
        add(clause, f"{name}, {what}", demand, play, mode)

# -- 3.1 and 3.2: states ------------------------------------------------------


def asked_meanwhile(name, condition, arguments=()):
    """The script is busy while something happens to a connection."""
    def play(lab):
        asker, client = lab.client(), lab.client()
        with lab.system.busy:
            conid = client.conid
            data, call = asker.request(name, *arguments, conid=conid,
                                       delay=300000)
            asker.sock.sendall(data)
            time.sleep(0.1)
            condition(client)
            return asker.answer(call, 0.3)
    return play


def half_close(client):
    client.sock.shutdown(socket.SHUT_WR)


def message_and_fin(client):
    client.sock.sendall(client.request("conid")[0])
    client.sock.shutdown(socket.SHUT_WR)


def message_and_reset(client):
    client.sock.sendall(client.request("conid")[0])
    reset(client)


for what, condition, state in (
        ("FIN came", lambda client: client.sock.close(), -2),
        ("FIN came, half-closed", half_close, -2),
        ("a message and FIN came", message_and_fin, -2),
        ("RST came", reset, -3),
        ("a message and RST came", message_and_reset, -3)):
    add("3.2", f"tcp_conid_state, {what} while the script was busy", state,
        asked_meanwhile("tcp_conid_state", condition), "busy")
    add("3.1", f"tcp_conid_alive, {what} while the script was busy", -1,
        asked_meanwhile("tcp_conid_alive", condition), "busy")


@scenario("3.2", "tcp_conid_state, in a message with FIN right behind it", -2)
def _(lab):
    client = lab.client()
    data, call = client.request("tcp_conid_state", conid=client.conid)
    client.sock.send(data, socket.MSG_MORE)  # in one segment with the FIN
    client.sock.shutdown(socket.SHUT_WR)
    return client.receive(call, 2) or "no answer"


for name, (clause, arguments) in FUNCTIONS.items():
    if clause in ("3.3", "3.4", "3.5", "3.6"):
        for what, condition in (("FIN", lambda client: client.sock.close()),
                                ("RST", reset)):
            add(clause, f"{name}, {what} came while the script was busy", 1,
                asked_meanwhile(name, condition, arguments), "busy")
for what, condition, result in (
        ("FIN", lambda client: client.sock.close(), 1), ("RST", reset, -1)):
    add("3", f"tcp_close_connection, {what} came while the script was busy",
        result, asked_meanwhile("tcp_close_connection", condition), "busy")


@scenario("3.2", "tcp_conid_state, the socket that accepts connections", 2)
def _(lab):
    asker = lab.client()
    conid = asker.ask("listener")
    return conid if conid == "unknown" else asker.ask("tcp_conid_state",
                                                      conid=conid)


@scenario("3.2", "tcp_conid_state, a socket in an unknown bad state", -4)
def _(lab):
    return lab.client().ask("broken")


@scenario("3.2", "tcp_conid_state, after the first message", 1)
def _(lab):
    client, conid = lab.silent()
    before = lab.client().ask("tcp_conid_state", conid=conid)
    client.talk()
    after = lab.client().ask("tcp_conid_state", conid=conid)
    lab.note = f"before it {before}"
    return after


@scenario("3.2", "tcp_conid_state, connect was refused", -1)
def _(lab):
    listener, asker = lab.listener(), lab.client()
    address = "%s:%d" % listener.getsockname()
    listener.close()
    asker.ask("forward", address)
    time.sleep(0.2)
    return asker.ask("tcp_conid_state",
                     conid=asker.ask("tcp_get_conid", address))


# -- 3.3 and 3.4: keepalive ---------------------------------------------------


def enabled(*arguments, strings=False):
    return own("tcp_keepalive_enable", arguments, strings=strings)


for arguments, demand in (
        ((1, 1, 1), 1), ((32767, 127, 32767), 1),
        ((0, 5, 5), -1), ((60, 0, 5), -1), ((60, 5, 0), -1),
        ((0, 0, 0), -1), ((-1, -1, -1), -1), ((-1, 5, 5), -1),
        ((32768, 5, 5), -1), ((60, 128, 5), -1), ((60, 5, 32768), -1),
        ((99999, 999, 99999), -1), ((2 ** 40, 5, 5), -1)):
    add("3.3", "tcp_keepalive_enable, idle {}, count {}, interval {}".format(
        *arguments), demand, enabled(*arguments))
for arguments, demand in (((60, 5, 7), 1), (("60", "5.0", "7"), -1),
                          (("", 5, 7), -1), (("word", 5, 7), -1)):
    add("3.3", "tcp_keepalive_enable, the strings {!r}, {!r}, {!r}".format(
        *map(str, arguments)), demand, enabled(*arguments, strings=True))


def timer(*steps, by_conid=False, pause=0.0, outgoing=False):
    """Call functions, return the kernel's timer after each."""
    def play(lab):
        client = lab.outgoing()[0] if outgoing else lab.client()
        asker = lab.client() if by_conid else client
        conid, found = client.conid if by_conid else None, []
        for name, *arguments in steps:
            asker.ask(name, *arguments, conid=conid)
            time.sleep(pause)
            found.append(lab.timer(client))
        return ", ".join(found)
    return play


ENABLE = "tcp_keepalive_enable"
DISABLE = "tcp_keepalive_disable"


@scenario("3.3", "the kernel's timer where nobody has asked for keepalive",
          "no keepalive")
def _(lab):
    client = lab.client()
    client.talk()
    return lab.timer(client)


for what, demand, play in (
        ("60, 5, 5", "about 60 s", timer((ENABLE, 60, 5, 5))),
        ("60, 5, 5 by conid", "about 60 s",
         timer((ENABLE, 60, 5, 5), by_conid=True)),
        ("60, 5, 5 of an outgoing connection", "about 60 s",
         timer((ENABLE, 60, 5, 5), outgoing=True)),
        ("50, 5, 5, then 20, 5, 5", "about 50 s, about 20 s",
         timer((ENABLE, 50, 5, 5), (ENABLE, 20, 5, 5))),
        ("1, 5, 30, after a probe", "about 30 s",
         timer((ENABLE, 1, 5, 30), pause=1.3)),
        ("60, 5, 5, off, then -1, 5, 5, which fails",
         "about 60 s, no keepalive, no keepalive",
         timer((ENABLE, 60, 5, 5), (DISABLE,), (ENABLE, -1, 5, 5))),
        ("50, 5, 5, then 20, 128, 5, which fails", "about 50 s, about 50 s",
         timer((ENABLE, 50, 5, 5), (ENABLE, 20, 128, 5)))):
    add("3.3", f"the kernel's timer after {ENABLE} {what}", demand, play)
for what, play in (
        ("", timer((ENABLE, 60, 5, 5), (DISABLE,))),
        (" by conid", timer((ENABLE, 60, 5, 5), (DISABLE,), by_conid=True)),
        (" of an outgoing connection",
         timer((ENABLE, 60, 5, 5), (DISABLE,), outgoing=True))):
    add("3.4", f"the kernel's timer after {ENABLE} and {DISABLE}{what}",
        "about 60 s, no keepalive", play)


@scenario("3.3", 'example 1.4: tcp_keepalive_enable("60", "5", "5")',
          "1, about 60 s")
def _(lab):
    client = lab.client()
    result = client.ask("example 1.4")
    return f"{result}, {lab.timer(client)}"


def in_a_reply(client, name, *arguments, **how):
    """Have a function called in the onreply_route."""
    client.sock.sendall(client.request(name, *arguments, response=True,
                                       **how)[0])
    client.talk()  # by its answer the reply has been handled


@scenario("3.3", "tcp_keepalive_enable in onreply_route, without conid",
          "about 60 s")
def _(lab):
    client = lab.client()
    in_a_reply(client, ENABLE, 60, 5, 5)
    return lab.timer(client)


@scenario("3.3", "tcp_keepalive_enable in onreply_route, by conid",
          "about 60 s")
def _(lab):
    client = lab.client()
    in_a_reply(lab.client(), ENABLE, 60, 5, 2, conid=client.conid)
    return lab.timer(client)


@scenario("3.4", "tcp_keepalive_disable in onreply_route, without conid",
          "about 60 s, no keepalive")
def _(lab):
    client = lab.client()
    client.ask(ENABLE, 60, 5, 5)
    before = lab.timer(client)
    in_a_reply(client, DISABLE)
    return f"{before}, {lab.timer(client)}"


@scenario("3.3", "keepalive 2, 3, 1: an idle peer vanishes",
          "tcp:timeout on time", slow=True)
def _(lab):
    client = lab.client()
    client.ask(ENABLE, 2, 3, 1)
    return vanished(lab, client, lambda: None)


@scenario("3.3", "keepalive 2, 3, 1: a peer vanishes with data in flight",
          "tcp:timeout on time", slow=True)
def _(lab):
    client, asker = lab.client(), lab.client()
    client.ask(ENABLE, 2, 3, 1)
    return vanished(lab, client, lambda: asker.ask(
        "forward", "%s:%d" % client.name))


def vanished(lab, client, then, make_vanish=vanish):
    """Have a peer vanish; return what is told within 12 s, and when."""
    make_vanish(client)
    start = time.monotonic()
    then()
    names = lab.told(client, 12)
    seconds = time.monotonic() - start - 0.2
    if names == "no event":
        lab.note = "within 12 s"
        return names
    lab.note = f"{seconds:.1f} s"
    # 2 + 3 * 1 s, or that less the second after which the last counts.
    return f"{names} {'on time' if 3.5 < seconds < 5.7 else 'late'}"


def unplugged(in_flight):
    def play(lab):
        if lab.net is None:
            raise Skip("the system is not on this machine")
        asker = lab.client()
        with lab.net.host(lab.system.address[1]) as (client, unplug):
            client.ask(ENABLE, 2, 3, 1)
            return vanished(lab, client, lambda: in_flight and asker.ask(
                "forward", "%s:%d" % client.name), unplug)
    return play


add("3.3", "keepalive 2, 3, 1: a host vanishes with its cable",
    "tcp:timeout on time", unplugged(False), slow=True)
add("3.3", "keepalive 2, 3, 1: a host vanishes with data in flight",
    "tcp:timeout on time", unplugged(True), slow=True)


def lives(prepare, buffer=None):
    """Enable keepalive, prepare something, see who lives 5 s later."""
    def play(lab):
        client, asker = lab.client(buffer), lab.client()
        conid = client.conid
        client.ask(ENABLE, 1, 2, 1)
        prepare(client, asker)
        time.sleep(5)
        return "lives" if asker.ask(
            "tcp_conid_state", conid=conid) == "1" else "ended"
    return play


def disable_and_vanish(client, asker):
    client.ask(DISABLE)
    vanish(client)


def shut_window(client, asker):
    """Have more sent to a client than its buffer takes."""
    for _ in range(10):
        asker.ask("forward", "%s:%d" % client.name, padding=8000 * "x")


add("3.3", "keepalive 1, 2, 1: an idle peer that lives", "lives",
    lives(lambda client, asker: None), slow=True)
add("3.3", "keepalive 1, 2, 1: a peer that lives and does not read", "lives",
    lives(shut_window, buffer=4096), slow=True)
add("3.4", "keepalive 1, 2, 1 disabled again, then the peer vanishes", "lives",
    lives(disable_and_vanish), slow=True)


# -- 3.5: lifetime ------------------------------------------------------------

LIFETIME = "tcp_set_connection_lifetime"
for value, demand in ((3605, 1), (1, 1), (-1, -1), (2 ** 31, -1),
                      (2 ** 32 + 60, -1), (2 ** 40, -1)):
    add("3.5", f"{LIFETIME}, {value} s", demand, own(LIFETIME, (value,)))
for value, demand in (("3605", 1), ("1.5", 1), ("1e3", -1), ("-1", -1),
                      ("word", -1), ("", -1)):
    add("3.5", f"{LIFETIME}, the string {value!r}", demand,
        own(LIFETIME, (value,), strings=True))


@scenario("3.5", f'example 1.6: {LIFETIME}("3605")', 1)
def _(lab):
    return lab.client().ask("example 1.6")


def closes(limit, start, lab, client, patience=15):
    """Return when a connection ends, and what is told of it."""
    end = client.wait(patience)
    seconds = None if end is None else end - start
    lab.note = "still open" if end is None else f"{seconds:.2f} s"
    when = ("never" if end is None else "early" if seconds < limit - 0.1
            else "late" if seconds > limit + 0.6 else "on time")
    return f"{when}, {lab.told(client, 1.5)}"


def idle(*lifetimes, by=lambda lab, client: client):
    """Set lifetimes, one after the other, and wait for the last."""
    def play(lab):
        client = lab.client()
        conid = client.conid
        asker = by(lab, client)
        for lifetime in lifetimes:
            asker.ask(LIFETIME, lifetime,
                      conid=None if asker is client else conid)
        return closes(lifetimes[-1], time.monotonic(), lab, client)
    return play


def another(lab, client):
    return lab.client()


def idle_before(seconds):
    def by(lab, client):
        time.sleep(seconds)
        return lab.client()
    return by


for what, play in (
        ("1 s", idle(1)), ("2 s", idle(2)), ("4 s", idle(4)),
        ("0 s", idle(0)), ("2 s, set from another connection",
                           idle(2, by=another)),
        ("2 s, set from outside of TCP", idle(2, by=lambda lab, _: lab.udp())),
        ("2 s, set after 8 s of silence", idle(2, by=idle_before(8))),
        ("1 s raised to 3 s", idle(1, 3)),
        ("30 s shortened to 2 s", idle(30, 2)),
        ("30 s shortened to 2 s from another connection",
         idle(30, 2, by=another))):
    add("3.5", f"an idle connection's lifetime of {what}",
        "on time, tcp:timeout", play, slow=True)


def busy(lifetime, talk):
    """Have traffic for longer than the lifetime, then none."""
    def play(lab):
        client, asker = lab.client(), lab.client()
        client.ask(LIFETIME, lifetime)
        start = time.monotonic()
        for _ in range(3):
            time.sleep(lifetime * 0.6)
            start = talk(client, asker) and time.monotonic() or start
            if client.wait(0.01):
                return "early"
        return closes(lifetime, start, lab, client)
    return play


for what, talk in (
        ("received", lambda client, asker: client.talk()),
        ("sent", lambda client, asker: asker.ask(
            "forward", "%s:%d" % client.name))):
    add("3.5", f"a lifetime of 2 s renewed by what is {what}",
        "on time, tcp:timeout", busy(2, talk), slow=True)


@scenario("3.5", "a lifetime of 2 s not renewed by a question about it",
          "on time, tcp:timeout", slow=True)
def _(lab):
    client, asker = lab.client(), lab.client()
    conid = client.conid
    client.ask(LIFETIME, 2)
    start = time.monotonic()
    time.sleep(1)
    asker.ask("tcp_conid_state", conid=conid)
    return closes(2, start, lab, client)


@scenario("3.5", "the default lifetime (of 4 s), an idle connection",
          "on time, tcp:closed", "alone", slow=True)
def _(lab):
    client = lab.client()
    client.talk()
    return closes(4, time.monotonic(), lab, client)


@scenario("3.5", "the default lifetime (of 4 s), a connection never used",
          "on time, tcp:closed", "alone", slow=True)
def _(lab):
    return closes(4, time.monotonic(), lab, lab.client())


@scenario("3.5", "the default lifetime (of 4 s) raised to 60 s", "1, lives",
          "alone", slow=True)
def _(lab):
    client = lab.client()
    result = client.ask(LIFETIME, 60)
    return f"{result}, {lab.ended(client, 5)}"


def of_a(make, result):
    """Set a lifetime of 1 s by conid on some connection."""
    def play(lab):
        client, conid, asker = make(lab)
        if asker.ask(LIFETIME, 1, conid=conid) != result:
            return "not set"
        return closes(1, time.monotonic(), lab, client)
    return play


def silent_one(lab):
    return *lab.silent(), lab.client()


def outgoing_one(lab):
    client, asker = lab.outgoing()
    return client, client.conid, asker


add("3.5", "a lifetime of 1 s of a connection never used",
    "on time, tcp:timeout", of_a(silent_one, "1"), slow=True)
add("3.5", "a lifetime of 1 s of an outgoing connection",
    "on time, tcp:timeout", of_a(outgoing_one, "1"), slow=True)


@scenario("3.5", "a lifetime of 1 s of a connection that does not stand yet",
          "tcp:timeout, -1", slow=True)
def _(lab):
    peer, asker = lab.deaf()
    conid = asker.ask("tcp_get_conid", "%s:%d" % peer.name)
    asker.ask(LIFETIME, 1, conid=conid)
    time.sleep(1.5)
    return f"{lab.told(peer, 1)}, {asker.ask('tcp_conid_state', conid=conid)}"


@scenario("3.5", f"{LIFETIME} of 2 s in onreply_route, without conid",
          "on time, tcp:timeout", slow=True)
def _(lab):
    client = lab.client()
    in_a_reply(client, LIFETIME, 2)
    return closes(2, time.monotonic(), lab, client)


@scenario("3.5", "half a message, and nothing for 3 s", "on time, tcp:timeout",
          slow=True)
def _(lab):
    client = lab.client()
    client.sock.sendall(client.request("conid")[0][:99])
    return closes(3, time.monotonic(), lab, client, 6)


# -- 3.6, 2.1 and 4.1: events -------------------------------------------------

CLOSED_EVENT = "tcp_enable_closed_event"
for mode, demand in (("never", -1), ("always", -1)):
    add("3.6", f"{CLOSED_EVENT} without conid, closed_event"
        f" {MODES[mode][0]}", demand, own(CLOSED_EVENT, ()), mode)
    add("3.6", f"{CLOSED_EVENT} by conid, closed_event {MODES[mode][0]}", 1,
        own_conid(CLOSED_EVENT, ()), mode)


def by_fin(lab, client):
    client.sock.close()


def by_half_close(lab, client):
    half_close(client)


def by_reset(lab, client):
    reset(client)


def by_reset_behind_data(lab, client):
    """Part of a message, which nobody can answer, and then an RST."""
    client.sock.sendall(client.request("conid")[0][:99])
    reset(client)


def by_reset_behind_messages(lab, client):
    client.sock.sendall(client.request("conid")[0] * 3)
    reset(client)


def by_reset_behind_fin(lab, client):
    client.sock.shutdown(socket.SHUT_WR)
    time.sleep(0.1)
    reset(client)


def by_lifetime(lab, client):
    client.ask(LIFETIME, 1)
    client.wait(15)


def by_keepalive(lab, client):
    client.ask(ENABLE, 1, 2, 1)
    vanish(client)
    time.sleep(3)


def by_itself(lab, client):
    client.ask("tcp_close_connection")


def by_conid(lab, client):
    lab.client().ask("tcp_close_connection", conid=client.conid)


def by_violation(lab, client):
    client.sock.sendall(b"this is no SIP\r\nContent-Length: nonsense\r\n\r\n")


WAYS = {
    "FIN": (by_fin, "tcp:closed"),
    "FIN, half-closed": (by_half_close, "tcp:closed"),
    "FIN, then RST": (by_reset_behind_fin, "tcp:closed"),
    "RST": (by_reset, "tcp:reset"),
    "RST behind half a message": (by_reset_behind_data, "tcp:reset"),
    "RST behind three messages": (by_reset_behind_messages, "tcp:reset"),
    "its lifetime": (by_lifetime, "tcp:timeout"),
    "keepalive": (by_keepalive, "tcp:timeout"),
    "tcp_close_connection from another": (by_conid, "tcp:closed"),
    "tcp_close_connection on itself": (by_itself, "tcp:closed"),
    "what is no SIP": (by_violation, "tcp:closed"),
}


def death(way, enable=None, told=True):
    """Have a connection die; where no event is to be told, that it did."""
    def play(lab):
        client = lab.client()
        client.ask(LIFETIME, 60)
        if enable is not None:
            client.ask(CLOSED_EVENT, conid=enable(client))
        if told:
            way(lab, client)
            return lab.told(client, 2)
        client.conid  # else it would be asked for when it is needed
        way(lab, client)
        return f"{lab.ended(client)}, {lab.told(client, 1)}"
    return play


for way, (play, event) in WAYS.items():
    slow = way in ("its lifetime", "keepalive")
    add("4.1", f"closed_event 1, it ends by {way}", event, death(play),
        "always", slow)
    add("4.1", f"closed_event 1, no route but tcp:closed, it ends by {way}",
        "tcp:closed", death(play), "alone", slow)
    add("2.1", f"closed_event 0, it ends by {way}", "ended, no event",
        death(play, told=False), "never", slow)
    add("2.1", f"closed_event 2, not enabled, it ends by {way}",
        "ended, no event", death(play, told=False), "manual", slow)
    add("2.1", f"closed_event 2, enabled, it ends by {way}", event,
        death(play, lambda client: None), "manual", slow)


def silent_death(way):
    def play(lab):
        client = lab.client()
        client.conid  # else it would be asked for when it is needed
        time.sleep(8)
        way(lab, client)
        return lab.told(client, 2)
    return play


for way in ("FIN", "RST", "tcp_close_connection from another"):
    add("4.1", f"closed_event 1, it ends after 8 s of silence by {way}",
        WAYS[way][1], silent_death(WAYS[way][0]), slow=True)
add("2.1", "closed_event 2, enabled by conid, it ends by FIN", "tcp:closed",
    death(by_fin, lambda client: client.conid), "manual")
add("2.1", "closed_event 0, enabled by conid, it ends by FIN",
    "ended, no event", death(by_fin, lambda client: client.conid, told=False),
    "never")


@scenario("2.1", "closed_event 2, enabled in onreply_route, it ends by FIN",
          "tcp:closed", "manual")
def _(lab):
    client = lab.client()
    in_a_reply(client, CLOSED_EVENT)
    client.sock.close()
    return lab.told(client)


@scenario("4.1", "$conid in the event route", "its conid")
def _(lab):
    client = lab.client()
    conid = client.conid
    client.sock.close()
    lab.told(client)
    found = [event.conid for event in lab.ends(client)]
    return "its conid" if found == [conid] else ", ".join(found) or "none"


@scenario("4.1", "$proto, $si, $sp, $Ri and $Rp in the event route",
          "its addresses")
def _(lab):
    client = lab.client()
    client.talk()
    client.sock.close()
    lab.told(client)
    wanted = ("tcp", *map(str, client.name + lab.system.address))
    found = [event[2:] for event in lab.ends(client)]
    return "its addresses" if found == [wanted] else str(found)


@scenario("4.1", "a message with FIN right behind it",
          "answered, tcp:closed")
def _(lab):
    client = lab.client()
    data, call = client.request("conid")
    client.sock.send(data, socket.MSG_MORE)
    client.sock.shutdown(socket.SHUT_WR)
    answer = client.receive(call, 2) or "no answer"
    return f"{'answered' if answer.isdigit() else answer}, {lab.told(client)}"


@scenario("4.1", "a message sent while the script was busy for longer than"
          " the lifetime", "answered", "busy")
def _(lab):
    asker, client = lab.client(), lab.client()
    with lab.system.busy:
        client.ask(LIFETIME, 1)
        asker.sock.sendall(asker.request("conid", delay=1500000)[0])
        time.sleep(0.5)
        return "answered" if client.ask("conid", delay=1500000).isdigit() \
            else "closed"


@scenario("4.1", "an RST that is met while sending", "tcp:reset", "busy")
def _(lab):
    asker, client = lab.client(), lab.client()
    with lab.system.busy:
        conid = client.ask("conid")
        asker.sock.sendall(asker.request(
            "forward", "%s:%d" % client.name, conid=conid, delay=300000)[0])
        time.sleep(0.1)
        reset(client)
        return lab.told(client)


@scenario("4.1", "FIN, then an RST that is met while sending", "tcp:closed",
          "busy")
def _(lab):
    asker, client = lab.client(), lab.client()
    with lab.system.busy:
        conid = client.ask("conid")
        data = asker.request("forward", "%s:%d" % client.name, conid=conid)[0]
        asker.sock.sendall(asker.request("conid", delay=300000)[0] + 2 * data)
        time.sleep(0.1)
        client.sock.close()
        return lab.told(client)


def said(old, new, patience=2):
    """Send a request in which something has been replaced."""
    def play(lab):
        client = lab.client()
        client.talk()
        client.sock.sendall(re.sub(old, new, client.request("conid")[0]))
        return lab.told(client, patience)
    return play


for what, old, new in (
        ("bytes without end or sense", rb"[\0-\x7f]", b"\x80"),
        ("HTTP", b"^.*", b"GET / HTTP/1.1"),
        ("two lengths", b"(Content-Length: )0", rb"\g<0>\r\n\g<1>3"),
        ("no length", b"Content-Length: 0\r\n", b"")):
    add("4.1", f"a peer that sends {what}", "tcp:closed", said(old, new))
add("4.1", "a peer that ends its lines with LF alone", "tcp:timeout",
    said(b"\r\n", b"\n", 5), slow=True)


@scenario("4.1", "an accepted connection that never said a word",
          "tcp:closed")
def _(lab):
    client = lab.client()
    client.sock.close()
    return lab.told(client)


def closed_by_conid(make):
    def play(lab):
        client, conid, asker = make(lab)
        result = asker.ask("tcp_close_connection", conid=conid)
        return f"{result}, {lab.told(client, 5)}"
    return play


def connecting_one(lab):
    peer, asker = lab.deaf()
    return peer, asker.ask("tcp_get_conid", "%s:%d" % peer.name), asker


for what, make in (("a connection never used", silent_one),
                   ("an outgoing connection", outgoing_one),
                   ("an outgoing connection that does not stand yet",
                    connecting_one)):
    add("4.1", f"tcp_close_connection by conid, {what}", "1, tcp:closed",
        closed_by_conid(make), slow=True)


@scenario("4.1", "$Ri and $Rp in the event route, an outgoing connection",
          "its addresses")
def _(lab):
    client, _ = lab.outgoing()
    peer = client.sock.getpeername()
    client.sock.close()
    lab.told(client)
    found = ["%s:%s" % event[5:] for event in lab.ends(client)]
    return "its addresses" if found == ["%s:%d" % peer] else (
        "the listener's" if found == ["%s:%d" % lab.system.address]
        else ", ".join(found) or "no event")


@scenario("4.1", "a peer that stops reading, for longer than 3 s",
          "tcp:timeout", slow=True)
def _(lab):
    client, asker = lab.client(4096), lab.client()
    client.talk()
    address = "%s:%d" % client.name
    for _ in range(1000):  # until it takes nothing any more
        if asker.ask("forward", address, padding=30000 * "x") != "1":
            break
    return lab.told(client, 8)


@scenario("4.1", "an outgoing connection, FIN from the peer", "tcp:closed")
def _(lab):
    client, _ = lab.outgoing()
    client.sock.close()
    return lab.told(client)


@scenario("4.1", "an outgoing connection, RST from the peer", "tcp:reset")
def _(lab):
    client, _ = lab.outgoing()
    reset(client)
    return lab.told(client)


@scenario("4.1", "an outgoing connection, refused", "tcp:reset")
def _(lab):
    listener, asker = lab.listener(), lab.client()
    client = Client(listener)
    listener.close()
    asker.ask("forward", "%s:%d" % client.name)
    return lab.told(client, 2)


@scenario("4.1", "an outgoing connection, no answer for 3 s", "tcp:timeout",
          slow=True)
def _(lab):
    peer, _ = lab.deaf()
    return lab.told(peer, 12)


# -- conids -------------------------------------------------------------------


@scenario("3", "the conids of 300 connections, one after the other",
          "300 different, none before", slow=True)
def _(lab):
    first, seen = lab.client().conid, set()
    for _ in range(300):
        client = lab.client()
        seen.add(client.conid)
        client.sock.close()
    before = sum(int(conid) <= int(first) for conid in seen
                 if conid.isdigit())
    return f"{len(seen)} different, {before or 'none'} before"


@scenario("3", "the state of a conid after 100 connections more", -1,
          slow=True)
def _(lab):
    client = lab.client()
    conid = client.conid
    client.sock.close()
    for _ in range(100):
        client = lab.client()
        client.talk()
        client.sock.close()
    return lab.client().ask("tcp_conid_state", conid=conid)


@scenario("3", "tcp_get_conid, a connection that stands", "its conid")
def _(lab):
    clients = [lab.client(), lab.client()]
    conids = [client.conid for client in clients]
    found = [lab.client().ask("tcp_get_conid", "%s:%d" % client.name)
             for client in clients]
    return "its conid" if found == conids and len({
        conid for conid in conids if conid.isdigit()}) == 2 else str(found)


@scenario("3", "tcp_get_conid, a peer that is not connected", -1)
def _(lab):
    return lab.client().ask("tcp_get_conid", f"{lab.source}:9")


@scenario("3", "tcp_get_conid, a SIP URI", "its conid")
def _(lab):
    client = lab.client()
    conid = client.conid
    found = lab.client().ask("tcp_get_conid", "sip:x@%s:%d" % client.name)
    return "its conid" if found == conid else found


@scenario("3", "tcp_close_connection on itself, then an answer",
          "answered, closed")
def _(lab):
    client = lab.client()
    before = "answered" if client.talk().isdigit() else "not answered"
    return f"{before}, {client.ask('tcp_close_connection')}"


@scenario("3", "an answer, then tcp_close_connection on itself", 1)
def _(lab):
    return lab.client().ask("answer, then tcp_close_connection")


def closed_before(name, arguments):
    """Ask in the very segment in which a connection is closed by conid."""
    def play(lab):
        client, asker = lab.client(), lab.client()
        data, _ = asker.request("tcp_close_connection", conid=client.conid)
        then, call = asker.request(name, *arguments, conid=client.conid)
        asker.sock.sendall(data + then)
        return asker.answer(call)
    return play


for name, (clause, arguments) in [*FUNCTIONS.items(),
                                  ("tcp_close_connection", ("3", ()))]:
    add(clause, f"{name}, tcp_close_connection has just been called", -1,
        closed_before(name, arguments))


@scenario("3", "tcp_close_connection, conid 999999", -1)
def _(lab):
    return lab.client().ask("tcp_close_connection", conid=999999)


@scenario("3", "tcp_set_otcpid: what is forwarded goes out on that connection",
          "there")
def _(lab):
    client, asker = lab.client(), lab.client()
    conid = client.conid
    asker.ask("forward", f"{lab.source}:9", otcpid=conid)
    client.sock.settimeout(2)
    try:
        return "there" if client.sock.recv(65536).startswith(b"OPTIONS") else (
            "something else")
    except socket.timeout:
        return "not there"

# -- where Kamailio answers otherwise -----------------------------------------


def each(functions, *whats):
    """Return the keys of the same scenarios of several functions."""
    return [f"{FUNCTIONS[name][0]} {name}, {what}"
            for name in functions for what in whats]


PROBES = ["tcp_conid_alive", "tcp_conid_state"]
OPTIONS = [ENABLE, DISABLE]
BOOKS = [LIFETIME, CLOSED_EVENT]
NOT_FOUND = ["a connection that has ended", "conid 0", "conid -5",
             "conid 999999", "conid 2147483647", "conid 1099511627776"]
BUSY = ["FIN came while the script was busy",
        "RST came while the script was busy"]
ALONE = "4.1 closed_event 1, no route but tcp:closed, it ends by"


class Group(NamedTuple):
    """Scenarios in which Kamailio answers otherwise, for the same reason."""
    title: str
    kamailio: tuple  #: what it answers: one of these, its processes race
    why: str         #: the sentence of the specification, or the reason
    keys: list


#: Where tcpops answers otherwise than Kamailio 5.6.3 does.
GROUPS = [
    Group("`tcp_conid_alive` and `tcp_conid_state` without a conid",
          ("unknown",), '3.1, 3.2: "conid (optional)". Kamailio has only the'
          " form with a conid",
          each(PROBES, "in a message, without conid",
               "outside of TCP, without conid",
               "in a message of an outgoing connection, without conid")),
    Group("numbers that a variable holds as a string", ("-1",),
          'The examples pass `"60"` and `"$var(conid)"`. Kamailio takes such a'
          " literal, but no variable that holds a string",
          each(FUNCTIONS, "conid and arguments as strings")
          + [f"3.3 {ENABLE}, the strings '60', '5', '7'",
             f"3.5 {LIFETIME}, the string '3605'",
             f"3.5 {LIFETIME}, the string '1.5'"]),
    Group("lifetime and closed event, an unknown conid", ("no answer",),
          '3.5, 3.6: "Retuns 1 on success, -1 on failure". Kamailio returns 0,'
          " which ends the script",
          each(BOOKS, *NOT_FOUND)),
    Group("state, FIN came while the script was busy", ("-1", "1"),
          '3.2: "-2: Socket has reached EOF". Kamailio answers from memory,'
          " and closes by itself at a FIN",
          each(PROBES[1:], BUSY[0],
               "FIN came, half-closed while the script was busy",
               "a message and FIN came while the script was busy")),
    Group("state, RST came while the script was busy", ("-1", "1"),
          '3.2: "-3: Socket error has occured". Kamailio answers from memory,'
          " and closes by itself at an RST",
          each(PROBES[1:], BUSY[1],
               "a message and RST came while the script was busy")),
    Group("alive, FIN or RST came while the script was busy", ("-1", "1"),
          '3.1: "or is about to be closed". Kamailio answers from memory',
          each(PROBES[:1], *BUSY,
               "FIN came, half-closed while the script was busy",
               "a message and FIN came while the script was busy",
               "a message and RST came while the script was busy")),
    Group("keepalive and close, FIN or RST came while the script was busy",
          ("-1", "1"), "A conid is valid until its end has been reported."
          " Kamailio may close in another process meanwhile",
          each(OPTIONS, *BUSY) + [f"3 tcp_close_connection, {what}"
                                  for what in BUSY]),
    Group("lifetime and closed event, FIN or RST came while the script was"
          " busy", ("no answer", "1"), "A conid is valid until its end has"
          " been reported. Kamailio may close in another process meanwhile",
          each(BOOKS, *BUSY)),
    Group("state, the socket that accepts connections", ("unknown",),
          '3.2: "2: Socket is accepting incoming connections". In Kamailio'
          " such a socket has no conid",
          ["3.2 tcp_conid_state, the socket that accepts connections"]),
    Group("state, a socket in an unknown bad state", ("unknown",),
          '3.2: "-4: Socket is in unknow bad state". Kamailio cannot be'
          " brought to it from outside",
          ["3.2 tcp_conid_state, a socket in an unknown bad state"]),
    Group("keepalive values that the kernel refuses", ("1",),
          '3.3: "-1 on failure". Kamailio ignores that the kernel refuses',
          [f"3.3 {ENABLE}, idle {idle}, count {count}, interval {interval}"
           for idle, count, interval in (
               (0, 5, 5), (60, 0, 5), (60, 5, 0), (0, 0, 0), (-1, -1, -1),
               (-1, 5, 5), (32768, 5, 5), (60, 128, 5), (60, 5, 32768),
               (99999, 999, 99999), (2 ** 40, 5, 5))]),
    Group("the kernel's keepalive after values that it refuses",
          ("about 60 s, no keepalive, about 60 s", "about 50 s, about 20 s"),
          "A call that returns -1 has changed nothing. Kamailio has turned"
          " keepalive on, and set the values that the kernel accepted",
          [f"3.3 the kernel's timer after {ENABLE} 60, 5, 5, off, then -1, 5,"
           " 5, which fails",
           f"3.3 the kernel's timer after {ENABLE} 50, 5, 5, then 20, 128, 5,"
           " which fails"]),
    Group("the kernel's keepalive where it was not enabled",
          ("about 120 min",), '1: "on demand". Kamailio turns it on, with the'
          " system's two hours, for every connection (tcp_keepalive)",
          ["3.3 the kernel's timer where nobody has asked for keepalive"]),
    Group("keepalive, a peer vanishes with data in flight", ("no event",),
          '3.3: "number of non-acked keepalive before reseting the'
          ' connection". The kernel sends none while data is in flight;'
          " tcpops has a deadline of its own",
          [f"3.3 keepalive 2, 3, 1: a {who} vanishes with data in flight"
           for who in ("peer", "host")]),
    Group("lifetimes of 2^31 s and more", ("1",),
          "Out of range. Kamailio turns it into another number",
          [f"3.5 {LIFETIME}, {value} s"
           for value in (2 ** 31, 2 ** 32 + 60, 2 ** 40)]),
    Group("a lifetime, however set, and its end",
          ("late, no event", "never, no event", "on time, no event"),
          '3.5: "lifetime (seconds)"; 4.1: "or timeout". Kamailio checks'
          " lifetimes rarely (here up to 9 s late, or not within 15 s), and"
          " does not report the end",
          [*(f"3.5 an idle connection's lifetime of {what}" for what in (
              "1 s", "2 s", "4 s", "0 s", "2 s, set from another connection",
              "2 s, set from outside of TCP", "2 s, set after 8 s of silence",
              "1 s raised to 3 s", "30 s shortened to 2 s",
              "30 s shortened to 2 s from another connection")),
           *(f"3.5 a lifetime of {what}" for what in (
               "2 s renewed by what is received",
               "2 s renewed by what is sent",
               "2 s not renewed by a question about it",
               "1 s of a connection never used",
               "1 s of an outgoing connection")),
           f"3.5 {LIFETIME} of 2 s in onreply_route, without conid",
           "3.5 the default lifetime (of 4 s), an idle connection",
           "3.5 the default lifetime (of 4 s), a connection never used"]),
    Group("the event of a lifetime's end", ("no event",),
          '4.1: "or timeout"',
          ["4.1 closed_event 1, it ends by its lifetime",
           f"{ALONE} its lifetime",
           "2.1 closed_event 2, enabled, it ends by its lifetime"]),
    Group("a lifetime of a connection that is still connecting",
          ("no event, 3",), "The same. Kamailio has another deadline for it",
          ["3.5 a lifetime of 1 s of a connection that does not stand yet"]),
    Group("half a message, and nothing for long", ("never, no event",),
          "message_timeout, against peers that drip bytes. Kamailio waits",
          ["3.5 half a message, and nothing for 3 s"]),
    Group("invalid or ambiguous SIP", ("no event",),
          "RFC 3261, 7 and 18.3: after such a message the start of the next"
          " is unknown. Kamailio waits, skips it, or accepts it",
          [f"4.1 a peer that {what}" for what in (
              "sends bytes without end or sense", "sends HTTP",
              "sends two lengths", "ends its lines with LF alone")]),
    Group("a reset or a timeout where `event_route[tcp:closed]` is the only"
          " one", ("no event",), '4.1: "closed by the remote party, or reset,'
          ' or timeout". Kamailio 5.6.3 calls tcp:reset and tcp:timeout for'
          " the latter two, even without handlers for them",
          [f"{ALONE} RST", f"{ALONE} keepalive"]),
    Group("an RST behind data, `event_route[tcp:closed]` is the only one",
          ("tcp:closed", "no event"), "4.1: the same. Kamailio may take an"
          " RST behind data for a FIN",
          [f"{ALONE} RST behind half a message",
           f"{ALONE} RST behind three messages"]),
    Group("an RST behind data, or met while sending",
          ("tcp:closed", "tcp:reset"), '4.1: "reset". Kamailio may take such'
          " an RST for a FIN",
          [f"{clause} closed_event {mode}, it ends by RST behind {what}"
           for what in ("half a message", "three messages")
           for clause, mode in (("4.1", "1"), ("2.1", "2, enabled"))]
          + ["4.1 an RST that is met while sending"]),
    Group("a peer that stops reading", ("tcp:closed",), '4.1: "or timeout".'
          " Kamailio's send timeout ends it, as tcp:closed",
          ["4.1 a peer that stops reading, for longer than 3 s"]),
    Group("`tcp_close_connection` by conid of a connection that is silent, or"
          " outgoing", ("no event", "1, no event", "1, tcp:closed"),
          "Every conid ends in one event. Kamailio has none if one process"
          " closes and another reads",
          ["4.1 closed_event 1, it ends after 8 s of silence by"
           " tcp_close_connection from another",
           *(f"4.1 tcp_close_connection by conid, {what}" for what in (
               "a connection never used", "an outgoing connection",
               "an outgoing connection that does not stand yet"))]),
    Group("state, alive and close, right after `tcp_close_connection`",
          ("1", "-1"), "A conid is gone once this has returned 1. In Kamailio"
          " another process closes later",
          each([*PROBES, *OPTIONS],
               "tcp_close_connection has just been called")
          + ["3 tcp_close_connection, tcp_close_connection has just been"
             " called"]),
    Group("lifetime and closed event, right after `tcp_close_connection`",
          ("no answer", "1"), "The same",
          each(BOOKS, "tcp_close_connection has just been called")),
    Group("an outgoing connection that fails", ("no event",), "Every conid"
          " ends in one event. Kamailio has none for a connect that fails",
          ["4.1 an outgoing connection, refused",
           "4.1 an outgoing connection, no answer for 3 s"]),
    Group("`$conid` in the event route", ("<null>",), '4.1: "The corresponding'
          ' $conid variable will be available in the event route"',
          ["4.1 $conid in the event route"]),
    Group("`$Ri` and `$Rp` in the event route, an outgoing connection",
          ("the listener's",), "They are the connection's own. Kamailio shows"
          " the address on which it listens",
          ["4.1 $Ri and $Rp in the event route, an outgoing connection"]),
    Group("`tcp_get_conid` of a SIP URI", ("-1",), "A URI is an address",
          ["3 tcp_get_conid, a SIP URI"]),
]

# -- the run ------------------------------------------------------------------


class Answer(NamedTuple):
    """What a system answered in a scenario; None: skipped, the note says why.
    """
    text: str
    note: str


def play(scenario, number, systems, net):
    """Play a scenario with one system; return an Answer."""
    system = systems.get(scenario.mode)
    if system is None:
        return Answer(None, f"no address for the mode {scenario.mode}")
    lab = Lab(system, number, net)
    try:
        return Answer(scenario.play(lab), lab.note)
    except Skip as skip:
        return Answer(None, str(skip))
    except OSError as error:
        return Answer(f"error: {error}", "")
    finally:
        lab.end()


def start(name, folder, number):
    """Start a system in every mode; return ({mode: System}, Net)."""
    net = Net(number)
    systems = {}
    try:
        for mode in MODES:
            hosts = ["127.0.0.1"] + ([net.ours] if mode == "always"
                                     and not net.reason else [])
            systems[mode] = Started(name, mode, folder, hosts)
        for system in systems.values():
            system.wait()
    except BaseException:
        stop(systems, net)
        raise
    return systems, net


def stop(systems, net):
    for system in systems.values():
        system.end()
    net.end()


def run_all(scenarios, places, progress):
    """Play scenarios with all systems; return {key: {system: Answer}}.

    Those that wait for time to pass wait together, and before the others, who
    would keep the processor from them.
    """
    numbers = {one.key: number for number, one in enumerate(SCENARIOS)}
    found = {one.key: {} for one in scenarios}
    done, all_of_them = itertools.count(1), len(scenarios) * len(places)

    def job(one, name):
        systems, net = places[name]
        number = numbers[one.key] * len(places) + [*places].index(name)
        found[one.key][name] = play(one, number, systems, net)
        progress(f"{next(done)} of {all_of_them}: {len(scenarios)} scenarios,"
                 f" {' and '.join(places)}")
    for slow, workers in ((True, 128), (False, 32)):
        pool = concurrent.futures.ThreadPoolExecutor(workers)
        try:
            for one in concurrent.futures.as_completed([
                    pool.submit(job, one, name) for one in scenarios
                    for name in places if one.slow is slow]):
                one.result()
        finally:  # at Ctrl-C nobody waits for those that wait
            pool.shutdown(wait=False, cancel_futures=True)
    return found


def verdict(scenario, answer):
    return ("skipped" if answer.text is None else
            "pass" if answer.text == scenario.demand else "differs")


def check_differences(scenarios, found):
    """Compare what tcpops and Kamailio answered with GROUPS; return what is
    wrong, a list of sentences.
    """
    listed = {key: {answer for group in GROUPS if key in group.keys
                    for answer in group.kamailio}
              for group in GROUPS for key in group.keys}
    wrong = []
    for one in scenarios:
        ours, theirs = (found[one.key].get(name, Answer(None, "")).text
                        for name in ("tcpops", "kamailio"))
        if ours is None or theirs is None:
            continue
        if one.key not in listed and ours != theirs:
            wrong.append(f"{one.key}: tcpops answers {ours!r}, Kamailio"
                         f" {theirs!r}, and the table does not say so")
        elif one.key in listed and theirs not in listed[one.key]:
            wrong.append(f"{one.key}: Kamailio answers {theirs!r}, and the"
                         f" table says {' or '.join(listed[one.key])!r}")
    return wrong


# -- what is printed ----------------------------------------------------------

HEAD = "clause", "what is done", "demanded"


def rows(scenarios, found, names):
    """Return the table, a list of lists of strings."""
    lines = [[*HEAD, *names, "verdict"]]
    for one in scenarios:
        answers = [found[one.key][name] for name in names]
        cells = [("skipped" if answer.text is None else answer.text)
                 + (f" ({answer.note})" if answer.note else "")
                 for answer in answers]
        bad = [name for name, answer in zip(names, answers)
               if verdict(one, answer) == "differs"]
        lines.append([one.clause, one.what, one.demand, *cells,
                      f"{', '.join(bad)} differs" if bad else
                      "skipped" if any(answer.text is None
                                       for answer in answers) else "pass"])
    return lines


def show_text(lines):
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(
            line, widths)).rstrip())


def show_paragraphs(lines):
    """Print each line but the first as a paragraph, for a terminal."""
    _, *names, _ = lines[0]
    for what, *answers, why in lines[1:]:
        print(textwrap.fill(what, 79))
        for text in [*map(": ".join, zip(names, answers)), why]:
            print(textwrap.fill(text, 79, initial_indent="    ",
                                subsequent_indent="    "))
        print()


def show_markdown(lines):
    lines = [[cell.replace("|", "\\|").replace(
                "<", "&lt;").replace(">", "&gt;") for cell in line]
             for line in lines]
    for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]:
        print("| " + " | ".join(line) + " |")


def differences():
    """Return the table of differences in README.md here, from GROUPS."""
    demands = {one.key: one.demand for one in SCENARIOS}
    return [["case", "Kamailio 5.6.3", "tcpops", "why"], *(
        [group.title, " or ".join(group.kamailio),
         " or ".join(dict.fromkeys(demands[key] for key in group.keys)),
         group.why] for group in GROUPS)]


def show_json(scenarios, found, wrong):
    print(json.dumps({"scenarios": [
        {"clause": one.clause, "what": one.what, "demanded": one.demand,
         "answers": {name: {"answer": answer.text, "note": answer.note,
                            "verdict": verdict(one, answer)}
                     for name, answer in found[one.key].items()}}
        for one in scenarios], "wrong": wrong}, indent=1))


# -- the command line ---------------------------------------------------------


def parse_system(text):
    """Return (name, mode, address) of NAME or NAME[:MODE]=HOST:PORT."""
    if text in COMMANDS:
        if text == "kamailio" and not shutil.which("kamailio"):
            raise argparse.ArgumentTypeError("Kamailio is not installed")
        return text, None, None
    parts = re.fullmatch(r"([^:=]+)(?::([^:=]*))?=([^:]+):(\d+)", text)
    if not parts or parts[1] in COMMANDS:
        raise argparse.ArgumentTypeError(
            f"expected {' or '.join(COMMANDS)}, or NAME[:MODE]=HOST:PORT with"
            f" another name, not {text!r}")
    name, mode, host, port = parts.groups()
    if mode not in (None, *MODES):
        raise argparse.ArgumentTypeError(
            f"expected a mode out of {', '.join(MODES)}, not {mode!r}")
    try:
        found = socket.getaddrinfo(*tcpops.parse_address(f"{host}:{port}"),
                                   socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{host}:{port}: {error}")
    return name, mode or "always", found[0][4]


def parser():
    modes = ", ".join(f"{mode} (closed_event {event}"
                      + (", a default lifetime of 4 s, event_route[tcp:closed]"
                         " and no other)" if alone else ")")
                      for mode, (event, _, alone) in MODES.items())
    parser = argparse.ArgumentParser(
        description="Ask systems what the specification demands.",
        epilog=f"Modes: {modes}. What a system must answer to be asked is in"
        " the text at the top of this file.")
    parser.add_argument(
        "--system", metavar="SYSTEM", action="append", type=parse_system,
        help="tcpops or kamailio, which are started, or NAME[:MODE]=HOST:PORT,"
        " one that runs there; again and again (default: tcpops, and kamailio"
        " if it is installed)")
    parser.add_argument("--only", metavar="TEXT", action="append",
                        help="scenarios whose clause or text contains this")
    parser.add_argument("--must-pass", metavar="NAME", action="append",
                        default=[], help="exit with 1 if this system differs"
                        " from what is demanded")
    parser.add_argument("--list", action="store_true",
                        help="print the scenarios and play none")
    parser.add_argument("--differences", action="store_true",
                        help="print the differences and play nothing; with"
                        " --markdown as a table")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--markdown", action="store_true",
                     help="print a Markdown table")
    how.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    parser.error = lambda text: parser.exit(2, f"conformance.py: {text}\n")
    return parser


def show_progress(text):
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def places_for(options, stack):
    """Start what is to be started; return {name: ({mode: System}, Net)}."""
    wanted = options.system
    if not wanted:
        wanted = [parse_system("tcpops")]
        if shutil.which("kamailio"):
            wanted.append(parse_system("kamailio"))
        else:
            print("Kamailio is not installed: tcpops is asked alone",
                  file=sys.stderr)
    unknown = set(options.must_pass) - {name for name, _, _ in wanted}
    if unknown:
        parser().error(f"--must-pass: {unknown.pop()} is not asked")
    places = {}
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    for name, mode, address in wanted:
        if mode is None:
            show_progress(f"starting {name}")
            places[name] = start(name, folder, len(places))
            stack.callback(stop, *places[name])
        else:
            systems, _ = places.setdefault(name, ({}, None))
            systems[mode] = System(address)
            stack.callback(systems[mode].end)
            systems[mode].check(name)
    return places


def have_peers_vanish():
    """Start again where peers can vanish, unless that is here or nowhere."""
    with contextlib.suppress(OSError):
        words = vanishing.where()
        if words:
            os.execvp(words[0], [*words, sys.executable, *sys.argv])


def main():
    options = parser().parse_args()
    if options.serve:
        mode, port, *hosts = options.serve
        Subject(mode, int(port), *hosts).run()
    show = show_markdown if options.markdown else show_text
    if options.json and (options.list or options.differences):
        parser().error("--json is for answers")
    if options.differences:
        show = show_markdown if options.markdown else show_paragraphs
        show(differences())
        return 0
    scenarios = [one for one in SCENARIOS if not options.only or any(
        text in one.key for text in options.only)]
    if not scenarios:
        parser().error(f"no scenario contains {options.only[0]!r}")
    if options.list:
        show([HEAD, *(one[:3] for one in scenarios)])
        return 0
    if not any(address for _, _, address in options.system or ()):
        have_peers_vanish()
    with contextlib.ExitStack() as stack:
        places = places_for(options, stack)
        found = run_all(scenarios, places, show_progress)
    show_progress("")
    wrong = check_differences(scenarios, found)
    if options.json:
        show_json(scenarios, found, wrong)
    else:
        show(rows(scenarios, found, [*places]))
        print()
        for name in places:
            count = collections.Counter(
                verdict(one, found[one.key][name]) for one in scenarios)
            print(f"{name}: " + ", ".join(
                f"{number} {word}" for word, number in count.items()))
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return int(bool(wrong) or any(
        verdict(one, found[one.key][name]) == "differs"
        for one in scenarios for name in options.must_pass))


def interrupted(number, _frame):
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        sys.exit(main())
    except KeyboardInterrupt as error:
        show_progress("")
        os._exit(128 + error.args[0])  # threads that wait would hold us up
