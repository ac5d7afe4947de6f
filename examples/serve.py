"""A server to operate: TLS, a control socket, filters, JSON, your handlers.

    python3 examples/serve.py --help

All of it stands on the public names of tcpops.  Three things are worth a look
if you build a server of your own:

- Nothing that is written waits for its reader.  Standard output and standard
  error have a thread and a bounded queue each (Output); a client of the
  control socket has a bounded buffer (Client).  Lines without room are
  counted, and the reader is told how many are missing.
- An answer is a generator (Server.command).  The loop takes SLICE seconds of
  all answers together in a turn, so a list of 10,000 connections keeps no one
  waiting, and a client that does not read stops its own answer only.
- Your handlers run behind those of this program: setup(ops) gets a facade
  (Facade) that keeps them apart.
"""

import argparse
import collections
import contextlib
import errno
import functools
import importlib.machinery
import importlib.util
import io
import ipaddress
import json
import logging
import operator
import os
import queue
import re
import reprlib
import select
import selectors
import signal
import socket
import stat
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tcpops

NAME = os.path.basename(sys.argv[0]) or "serve.py"
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
log = logging.getLogger("tcpops")

#: Seconds for queues to be sent when the program leaves.
DRAIN = 5
#: Lines of standard output, or error, that wait for their reader.
QUEUED = 1000
#: Ends that are remembered, for the command ends.
REMEMBERED = 1000
#: Seconds of the loop's time that the answers of a turn may take.
SLICE = 0.002
#: Bytes of a command, and of commands that wait.
LONGEST_COMMAND = 65536
#: Bytes of an answer, and of the lines a client follows, that wait for it.
UNSENT, FOLLOWED = 65536, 262144
#: Clients of the control socket at a time.
CLIENTS = 100

COMMANDS = r"""
list [FILTER...]                 the connections and listeners
close FILTER...                  end connections, their queues are sent first
lifetime SECONDS FILTER...       end them when they are idle for so long
keepalive I,C,N FILTER...        probe after I s of silence, C times, N s apart
keepalive off FILTER...          probe no more
send CONID TEXT                  send TEXT; \n \r \t \\ \xNN as in Python
stats                            counts since the start
ends [N]                         the last N ends (of the last 1,000)
follow [opened|message|end...]   each event as it comes, until you leave
reload                           read certificates and keys anew
drain SECONDS                    accept no more, send queues, end all, leave
quit, exit                       the same, with 5 seconds
help, ?                          this
tcp_NAME ARGUMENT...             a function of the specification, one of
""" + "\n".join(
    "  " + re.sub(r"[][,]", "", f"{name} {function.takes.upper()}")
    for name, function in vars(tcpops.SpecFunctions).items()
    if name.startswith("tcp_") and "otcpid" not in name)

FILTERS = """
A FILTER is FIELD=VALUE[,VALUE...], FIELD!=VALUE, FIELD>NUMBER, and so with <,
>= and <=; several are ANDed.  Quote > and < for the shell.  The fields are
those that list shows:
  conid proto framing    origin: accept, connect, attach or listen
  si sp Ri Rp            peer's and own address and port; si=10.0.0.0/8 works
  state                  number or name: state=1, state=EOF
  age idle lifetime      seconds; deadline: seconds until its next one fires
  keepalive opened       on or off; yes or no
  bytes_in bytes_out     queued: bytes of ours that the kernel has not taken
  listener               the conid of the listener that accepted it
"""

EPILOG = """
Examples:
  %(prog)s --listen --echo
  %(prog)s --listen 5060,framing=sip --listen 5061,framing=sip,certfile=a.pem
  %(prog)s --listen 8443 --framing ws --certfile examples/localhost.pem
  %(prog)s --connect localhost:8443 --framing ws --cafile \\
      examples/localhost.pem
  %(prog)s --listen --routes my_handlers.py --control /run/tcpops.sock --json
  %(prog)s --call /run/tcpops.sock list si=10.0.0.0/8 'idle>60'
  %(prog)s --call /run/tcpops.sock close 'queued>0' 'idle>300'
  %(prog)s --call /run/tcpops.sock follow end --json

A listener's own options follow it, with commas: framing, certfile, keyfile,
lifetime, keepalive, echo=yes.  A connect's: framing, tls=yes, cafile,
lifetime, keepalive, echo=yes.  Others are as given for all.

Handlers: FILE.py of --routes defines setup(ops), which is called once before
the first listener.  Its ops is the TcpOps, and "import tcpops" is this one:
  def setup(ops):
      @ops.request_route
      def welcome(msg):
          ops.tcp_set_connection_lifetime(3605)
          msg.reply(b"welcome\\n")

Commands, by --call PATH, or as lines into the socket (nc -U PATH):
""" + COMMANDS.strip() + "\n" + FILTERS + """
The socket answers each line with lines of JSON: one for each item of a list,
and a last one with "result", positive for success.  --call prints them for a
person, or with --json as they are; -- ends its options.

Signals: SIGINT (Ctrl-C) and SIGTERM close the listeners, send the queues for
5 s at the most, and end every connection; a second one, or one during
drain, stops at once.  SIGHUP is reload.

Exit status: 0, also after a signal, 130 after a second one; 1 if the system
said no; 2 for wrong usage.  With --call 0 if the result is positive, else 1.
With --connect alone it leaves when no connection is left, with 1 if none was
ever made.
"""

#: Long payloads are shown by their beginning and end.
SHORT = reprlib.Repr()
SHORT.maxother = SHORT.maxstring = 72

#: Details that say no more than their reason.
PLAIN_DETAILS = ("FIN from the peer", "closed by conid", "drained")


class Failure(Exception):
    """A reason to give up, in one line; exit status 1."""


def reason_of(error):
    """Return why the system said no, without its number."""
    return getattr(error, "strerror", None) or str(error)


def format_address(host, port):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# -- standard output and standard error ---------------------------------------


class Output(logging.Handler):
    """Writes lines, and the log, to a stream from a thread of its own.

    The caller never waits: lines for which the queue has no room are counted,
    and missing(count) is the line that says so.
    """

    def __init__(self, stream, missing, failed=lambda: None):
        super().__init__()
        self.failure = None  # the OSError after which nothing is written
        self._missing, self._failed = missing, failed
        self._encoding = getattr(stream, "encoding", "utf-8")
        # The bare file: a thread that waits with the lock of Python's buffers
        # would keep the interpreter from leaving.  None: started without one.
        buffer = getattr(stream, "buffer", None)
        self._file = getattr(buffer, "raw", buffer)
        self._queue, self._lost = queue.SimpleQueue(), 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def emit(self, record):
        self.line(self.format(record))

    def line(self, text):
        """Write a line."""
        if self._queue.qsize() < QUEUED:
            self._queue.put((self._lost, text + "\n"))
        else:
            self._lost += 1

    def finish(self, timeout):
        """Wait until all is written, for timeout seconds at the most."""
        self._queue.put(None)
        self._thread.join(max(0, timeout))

    def _run(self):
        """Write the queue, and at each gap how many lines it lacks."""
        told, entry = 0, (0, "")
        while entry:
            entry = self._queue.get()
            lost, text = entry or (self._lost, "")
            if lost > told:
                text = f"{self._missing(lost - told)}\n{text}"
                told = lost
            try:
                self._put(text)
            except OSError as error:
                self.failure = error
                return self._failed()
            if self._lost > told and self._queue.empty():
                self._queue.put((self._lost, ""))

    def _put(self, text):
        # A character that the encoding lacks must not lose the line.
        data = text.encode(self._encoding, "backslashreplace")
        while data and self._file is not None:
            sent = self._file.write(data)
            if sent is None:  # another program made it non-blocking
                select.select((), (self._file,), ())
            data = data[sent or 0:]


class Printed(io.TextIOBase):
    """Prints of handlers go the way of our lines: they wait for no reader.

    Nor is a line of theirs cut by one of ours.
    """

    def __init__(self, output):
        self._output, self._begun = output, ""

    def write(self, text):
        """Write the lines that are complete."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._output.line(line)
        return len(text)

    def finish(self):
        """Write the last line, though it has no end."""
        if self._begun:
            self.write("\n")


def missing_text(count):
    return f"({count} lines are missing here: no one read them in time)"


def missing_json(count):
    return json.dumps({"time": round(time.time(), 3), "event": "missing",
                       "lines": count})


# -- fields and filters -------------------------------------------------------


def describe(info, now):
    """Return the fields of a ConnectionInfo as list shows them."""
    fields = {}
    for name, value in zip(info._fields, info):
        if isinstance(value, float):
            value = round(value - now if name == "deadline" else value, 3)
        fields[name] = value
        if name == "state":
            fields["state_name"] = value.name
    return fields


def format_value(value):
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return ",".join(f"{name}:{held}" for name, held in value.items())
    if isinstance(value, str) and re.search("[^!-~]", value):
        return json.dumps(value)
    return str(value)


def format_fields(fields):
    """Return a dict as a person, or grep, wants it."""
    return " ".join(f"{name}={format_value(value)}"
                    for name, value in fields.items())


COMPARISONS = {">": operator.gt, "<": operator.lt,
               ">=": operator.ge, "<=": operator.le}
YES = {"yes": True, "no": False, "on": True, "off": False, "1": True,
       "0": False, "true": True, "false": False}


def value_parser(name):
    """Return (the parser of a filter's text, how a field is seen)."""
    if name in ("si", "Ri"):
        return functools.partial(ipaddress.ip_network, strict=False), str
    if name in ("proto", "framing", "origin"):
        return str, str
    if name == "state":
        return (lambda text: int(text) if re.fullmatch("-?[0-9]+", text)
                else tcpops.State[text.upper()]), int
    if name in ("opened", "keepalive"):
        return YES.__getitem__, bool
    return float, float


def make_filter(text):
    """Return the function of "FIELD=VALUE" and its like: fields -> bool."""
    match = re.fullmatch(r"(\w+)(!=|>=|<=|=|>|<)(.+)", text)
    if not match:
        raise ValueError(f"no filter: {text!r}; try proto=tls or 'idle>60'")
    name, sign, wanted = match.groups()
    if name not in tcpops.ConnectionInfo._fields:
        raise ValueError(f"no such field: {name}; there are "
                         + " ".join(tcpops.ConnectionInfo._fields))
    parse, see = value_parser(name)
    if sign in COMPARISONS and see is not float:
        raise ValueError(f"{name} is compared with = or !=, not {sign}")
    try:
        values = [parse(value) for value in (
            [wanted] if sign in COMPARISONS else wanted.split(","))]
    except (ValueError, KeyError):
        raise ValueError(f"no value of {name}: {wanted!r}") from None

    def equal(value):
        if name in ("si", "Ri"):
            address = ipaddress.ip_address(value)
            return any(address in network for network in values)
        return see(value) in values

    def fits(fields):
        value = fields[name]
        if name not in ("opened", "keepalive") and value in (None, ""):
            return sign == "!="  # it has none
        if sign in COMPARISONS:
            return COMPARISONS[sign](value, values[0])
        return equal(value) == (sign == "=")
    return fits


class Filters:
    """Several filters, ANDed."""

    def __init__(self, words):
        self._filters = [make_filter(word) for word in words]
        self._named = " ".join(words)

    def candidates(self, ops, listeners):
        """Return the conids to look at."""
        conids = ops.conids()
        if listeners or re.search(r"\b(origin|conid)[!=]", self._named):
            conids = [info.conid for info in ops.listeners()] + conids
        return conids

    def fit(self, fields):
        """Whether a connection passes all of them."""
        return all(fits(fields) for fits in self._filters)


# -- the values on the command line -------------------------------------------


def keepalive_settings(text):
    """Return the Keepalive of "IDLE,COUNT,INTERVAL"."""
    try:
        keepalive = tcpops.Keepalive(*map(int, text.split(",")))
        with socket.socket() as sock:
            tcpops.set_keepalive(sock, keepalive)  # the system may refuse
    except OSError as error:
        raise ValueError(f"keepalive {text!r}: {error.strerror}") from None
    except (TypeError, ValueError):
        raise ValueError(f"keepalive {text!r}: it takes three numbers, as in"
                         " 60,5,5") from None
    return keepalive


def seconds(text):
    """Return a lifetime."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", text):
        raise ValueError(f"no number of seconds: {text!r}")
    return float(text) if "." in text else int(text)


def yes_or_no(text):
    if text not in YES:
        raise ValueError(f"yes or no is wanted, not {text!r}")
    return YES[text]


def framing(text):
    if text not in tcpops.FRAMINGS:
        raise ValueError(f"framing is one of {', '.join(tcpops.FRAMINGS)},"
                         f" not {text!r}")
    return text


#: The options that a listener, or a connect, may have of its own.
OWN = {"framing": framing, "certfile": str, "keyfile": str, "tls": yes_or_no,
       "cafile": str, "lifetime": seconds, "keepalive": keepalive_settings,
       "echo": yes_or_no}


class Place(NamedTuple):
    """Where to listen or to connect, and the options of its own."""

    host: str
    port: int
    own: dict

    def option(self, name, options):
        """Return an option: its own one, or that of all."""
        return self.own.get(name, getattr(options, name))


def place(lowest_port, foreign, text):
    """Return the Place of "HOST:PORT[,NAME=VALUE...]"; for argparse.

    foreign are the options that are not for such a place.
    """
    address, *pairs = re.split(",(?=[a-z]+=)", text)
    if lowest_port == 0 and re.fullmatch("[0-9]+", address):
        address = "127.0.0.1:" + address
    try:
        if not re.fullmatch("[^/]+:[0-9]{1,9}", address):
            raise ValueError(f"HOST:PORT is wanted, not {address!r}")
        if not lowest_port <= int(address.rpartition(":")[2]) <= 65535:
            raise ValueError(f"no such port: {address.rpartition(':')[2]}")
        host, port = tcpops.parse_address(address, lowest_port)
        own = {}
        for pair in pairs:
            name, _, value = pair.partition("=")
            if name not in OWN or name in foreign:
                known = " ".join(set(OWN) - set(foreign))
                raise ValueError(f"no such option: {name}; there are {known}")
            own[name] = OWN[name](value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Place(host, port, own)


def for_argparse(parse):
    """Return a type for argparse, which shows a ValueError's words."""
    def parse_option(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return parse_option


def shown(text):
    """Return the kinds of events of "opened,message,end"."""
    kinds = set(text.split(","))
    if not kinds <= {"opened", "message", "end"}:
        raise ValueError(f"opened, message and end can be shown, not {text!r}")
    return kinds


OPTIONS = {
    "--listen": dict(
        metavar="[HOST:]PORT[,NAME=VALUE...]", action="append", nargs="?",
        const="127.0.0.1:5060",
        type=functools.partial(place, 0, ("tls", "cafile")),
        help="accept connections (bare: 127.0.0.1:5060; port 0: any); may be"
        " given again, each with options of its own"),
    "--connect": dict(
        metavar="HOST:PORT[,NAME=VALUE...]", action="append",
        type=functools.partial(place, 1, ("certfile", "keyfile")),
        help="connect; may be given again"),
    "--framing": dict(
        type=for_argparse(framing), default="raw",
        metavar="|".join(tcpops.FRAMINGS),
        help="a message is the bytes received at once (raw, the default), a"
        " line, a SIP message, or a WebSocket's (ws)"),
    "--certfile": dict(
        metavar="FILE", help="have listeners speak TLS, with this certificate"
        " (PEM)"),
    "--keyfile": dict(
        metavar="FILE", help="its key, if in a file of its own"),
    "--tls": dict(action="store_true", help="have --connect speak TLS"),
    "--cafile": dict(
        metavar="FILE", help="like --tls, but trust the certificates in this"
        " file (PEM)"),
    "--lifetime": dict(
        metavar="S", type=for_argparse(seconds), default=120,
        help="seconds of idleness allowed (default 120)"),
    "--keepalive": dict(
        metavar="IDLE,COUNT,INTERVAL", type=for_argparse(keepalive_settings),
        help="turn keepalive on for each connection as it opens"),
    "--closed-event": dict(
        metavar="N", type=int, default=1, choices=(0, 1, 2),
        help="whose end is reported, and so shown: 0 no one's, 1 everyone's"
        " (default), 2 where tcp_enable_closed_event was called"),
    "--max-connections": dict(
        metavar="N", type=int,
        help="how many at a time (default: as many as may be open)"),
    "--echo": dict(action="store_true", help="send each message back"),
    "--routes": dict(
        metavar="FILE.py", help="your handlers: it defines setup(ops)"),
    "--show": dict(
        metavar="KIND,...", type=for_argparse(shown),
        default={"opened", "message", "end"},
        help="show only these: opened,message,end (default all)"),
    "--quiet": dict(action="store_true", help="show nothing"),
    "--json": dict(action="store_true", help="one object a line"),
    "--control": dict(
        metavar="PATH", help="take commands over this Unix-domain socket"),
    "--call": dict(
        nargs="+", metavar=("PATH", "COMMAND"),
        help="send a command to such a socket and print the answer; the"
        " rest of the line is the command, but for --json"),
    "--log-level": dict(
        choices=("debug", "info", "warning", "error"), default="warning",
        help="of the log on standard error (default warning)"),
    "--version": dict(
        action="version", version=f"tcpops {tcpops.__version__}"),
}


def parse(argv):
    """Return (parser, options) of the command line."""
    parser = argparse.ArgumentParser(
        prog=NAME, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serves TCP, TLS and WebSocket connections, each with its"
        " conid, and has\nthem listed, filtered, changed and followed while it"
        " runs.", epilog=EPILOG)
    parser.error = lambda message: parser.exit(
        2, f"{NAME}: {message} (see --help)\n")
    for name, how in OPTIONS.items():
        parser.add_argument(name, **how)
    words = sys.argv[1:] if argv is None else [*argv]
    # argparse would not let a "--" through to the words behind --call.
    at = words.index("--call") if "--call" in words else len(words)
    options = parser.parse_args(words[:at])
    if at < len(words):
        options.call = words[at + 1:]
    if options.call is not None:
        check_call(parser, options)
    elif not options.listen and not options.connect:
        parser.error("nothing to do: give --listen or --connect, or --call")
    elif options.keyfile and not options.certfile:
        parser.error("--keyfile needs --certfile")
    elif options.certfile and not options.listen:
        parser.error("--certfile is for --listen")
    elif any(place.own.get("keyfile") and not (
            place.own.get("certfile") or options.certfile)
             for place in options.listen or ()):
        # It would speak plain text where TLS was meant.
        parser.error("--listen: keyfile needs certfile")
    elif (options.tls or options.cafile) and not options.connect:
        parser.error("--tls and --cafile are for --connect")
    if options.control and not hasattr(socket, "AF_UNIX"):
        parser.error("--control: this system has no Unix-domain sockets")
    return parser, options


def check_call(parser, options):
    """Find the options behind --call PATH COMMAND."""
    words, rest = options.call, []
    if "--" in words:
        at = words.index("--")
        words, rest = words[:at], words[at + 1:]
    options.json = options.json or "--json" in words
    options.call = [word for word in words if word != "--json"] + rest
    if len(options.call) < 2 or options.listen or options.connect:
        parser.error("--call takes PATH COMMAND [ARGUMENT...], and no"
                     " --listen or --connect beside it")
    if not hasattr(socket, "AF_UNIX"):
        parser.error("--call: this system has no Unix-domain sockets")


# -- TLS ----------------------------------------------------------------------


def ssl_module():
    try:
        import ssl
    except ImportError:
        raise Failure("this Python has no ssl module, so no TLS") from None
    return ssl


def check_readable(*paths):
    """Raise OSError for a file that cannot be read: PyPy's ssl hides why."""
    for path in filter(None, paths):
        open(path, "rb").close()


def no_password():
    raise ValueError("its key asks for a password")


def server_context(certfile, keyfile):
    """Return the ssl.SSLContext of a listener, None without a certificate."""
    if not certfile:
        return None
    ssl = ssl_module()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        check_readable(certfile, keyfile)
        context.load_cert_chain(certfile, keyfile or None, no_password)
    except (OSError, ValueError) as error:
        files = " and ".join(filter(None, (certfile, keyfile)))
        reason = ("a certificate and the key that fits it are needed, as PEM;"
                  " a key in a file of its own is keyfile"
                  if isinstance(error, ssl.SSLError) else reason_of(error))
        raise Failure(f"cannot use {files}: {reason}") from None
    return context


def client_context(wanted, cafile):
    """Return the ssl.SSLContext of a connect, None without TLS."""
    if not wanted and not cafile:
        return None
    ssl = ssl_module()
    try:
        check_readable(cafile)
        return ssl.create_default_context(cafile=cafile or None)
    except OSError as error:
        reason = ("there is no certificate in it, as PEM"
                  if isinstance(error, ssl.SSLError) else reason_of(error))
        raise Failure(f"cannot use {cafile}: {reason}") from None


# -- your handlers ------------------------------------------------------------


class Facade:
    """The argument of setup(ops): the TcpOps, but it registers handlers here.

    So they run beside those of the server, which has the TcpOps' own.
    """

    def __init__(self, ops):
        # Registering nothing but names and checks: it runs no handler.
        routes = tcpops.Handlers(None)
        vars(self).update(_ops=ops, _routes=routes, _request=None,
                          _onreply=None, event_route=routes.event_route)

    def __getattr__(self, name):
        return getattr(self._routes if name == "event_callback"
                       else self._ops, name)

    def __setattr__(self, name, value):
        if name == "event_callback" and not callable(value or print):
            raise TypeError("event_callback must be a function or None")
        setattr(self._routes if name == "event_callback" else self._ops,
                name, value)

    def modparam(self, module, name, value):
        """Set a parameter; an event_callback is the file's."""
        if (module, name) == ("tcpops", "event_callback"):
            self.event_callback = value
        else:
            self._ops.modparam(module, name, value)

    def request_route(self, handler):
        """Decorator: see TcpOps.request_route."""
        vars(self)["_request"] = self._routes.request_route(handler)
        return handler

    def onreply_route(self, handler):
        """Decorator: see TcpOps.onreply_route."""
        vars(self)["_onreply"] = self._routes.onreply_route(handler)
        return handler

    def message(self, msg):
        """Call the file's handler of a message, if it has one."""
        handler = self._request
        if self._onreply is not None and msg.is_reply:
            handler = self._onreply
        if handler is not None:
            handler(msg)

    def happened(self, event):
        """Call the file's handler of an event, if it has one."""
        handler, argument = self._routes.handler_of(event)
        if handler is not None:
            handler(argument)


def load_routes(path, facade):
    """Import a file and call its setup(ops)."""
    # Modules beside the file can be imported, as from any script.
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    name = Path(path).stem
    if name in sys.modules:
        name = f"routes {name}"
    loader = importlib.machinery.SourceFileLoader(name, path)
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module
    try:
        loader.exec_module(module)
        module.setup  # its absence is told below, without a line's number
    except Exception as error:
        raise Failure(explain(path, error)) from None
    try:
        module.setup(facade)
    except Exception as error:
        raise Failure(explain(path, error)) from None


def explain(path, error):
    """Return the fault of a file, and in which line of it."""
    if isinstance(error, OSError) and error.filename == path:
        return f"cannot read {path}: {reason_of(error)}"
    if isinstance(error, AttributeError) and error.args == (
            f"module {Path(path).stem!r} has no attribute 'setup'",):
        return f"{path} defines no setup(ops)"
    line = getattr(error, "lineno", None)  # of a SyntaxError
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    where = path if line is None else f"{path}:{line}"
    return f"{where}: {type(error).__name__}: {error}"


# -- the server ---------------------------------------------------------------


class LogTap(logging.Handler):
    """Collects the log: the reason behind a command's -1."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def unescape(text):
    """Return the bytes of a text with Python's escapes for bytes in it."""
    return re.sub(
        rb"\\([nrt\\]|x[0-9a-fA-F]{2})",
        lambda escape: escape[0].decode("unicode_escape").encode("latin-1"),
        text.encode("utf-8", "surrogateescape"))


class Server:
    """Handlers, and commands.

    A command is a generator of the dicts that it answers with, each a line;
    None ends a slice that has nothing to say.  It returns the last line, with
    the result.
    """

    def __init__(self, options, ops):
        self._options, self._ops = options, ops
        self.stopped = self.interrupted = self.opened = False
        self.drain_for = DRAIN
        self.followers = set()  # clients that follow, see Client
        self.started = time.monotonic()
        self._ends = collections.deque(maxlen=REMEMBERED)
        self._places = {}       # conid: Place of a listener, or a connect
        self._out = Output(sys.stdout, missing_json if options.json
                           else missing_text, self.stop)
        self.printed = Printed(self._out)
        self._err = Output(sys.stderr, missing_text)
        self._err.setLevel(options.log_level.upper())
        self._err.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._err)
        # The answers of commands tell warnings, also if they are not logged.
        log.setLevel(min(self._err.level, logging.WARNING))
        self.facade = Facade(ops)
        ops.request_route(self._message)
        for name in tcpops.EVENT_NAMES:
            ops.event_route(name)(self._happened)
        self._commands = {
            "list": self._list, "close": self._close, "send": self._send,
            "lifetime": self._lifetime, "keepalive": self._keepalive,
            "stats": self._stats, "ends": self._list_ends,
            "reload": self._reload, "drain": self._drain, "quit": self._quit,
            "exit": self._quit, "help": self._help, "?": self._help,
            "follow": self._follow}

    # -- starting and leaving -----------------------------------------------

    def stop(self):
        """Leave soon; safe in any thread, and in a signal handler."""
        self.stopped = True
        self._ops.stop()

    def interrupt(self, number, _frame):
        """Handle a signal: leave soon, or, if that was said before, now."""
        if self.stopped:
            self.interrupted = True
            for other in (signal.SIGINT, signal.SIGTERM, number):
                signal.signal(other, lambda *_: None)
            raise KeyboardInterrupt
        self.stop()

    def hang_up(self, _number, _frame):
        """Handle SIGHUP: reload."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._ops.call_soon(collections.deque, self._reload([]), 0)

    def listen(self, where):
        """Listen at a Place, and show it."""
        conid = self._start("listen on", self._ops.listen, where,
                            server_context(*self._pair(where)))
        info = self._ops.connection(conid)
        self._show_start("listening", f"listening on"
                         f" {format_address(info.Ri, info.Rp)}", info)

    def connect(self, where):
        """Connect to a Place, and show it."""
        wanted, cafile = (where.option(name, self._options)
                          for name in ("tls", "cafile"))
        if where.own.get("tls") is False:
            cafile = None
        conid = self._start("connect to", self._ops.connect, where,
                            client_context(wanted, cafile))
        self._show_start("connecting", "connecting to "
                         + format_address(where.host, where.port),
                         self._ops.connection(conid))

    def _pair(self, where):
        """Return the certificate and the key of a listener."""
        certfile = where.option("certfile", self._options)
        keyfile = where.own.get("keyfile")
        if keyfile is None and "certfile" not in where.own:
            keyfile = self._options.keyfile
        return certfile, keyfile

    def _start(self, what, method, where, context):
        try:
            conid = method(where.host, where.port, tls=context,
                           framing=where.option("framing", self._options))
        except (OSError, ValueError) as error:
            reason = reason_of(error)
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                reason += "; --listen 0 takes a port that is free"
            raise Failure(f"cannot {what} {format_address(*where[:2])}:"
                          f" {reason}") from None
        self._places[conid] = where
        return conid

    def _show_start(self, name, text, info):
        if info is None:
            return  # it has ended by now, and that is told
        how = (info.framing if info.proto == "tcp" else info.proto
               if info.framing == "ws" else f"{info.proto}, {info.framing}")
        self._print(f"{text} (conid {info.conid}, {how})", {
            "event": name, "conid": info.conid, "si": info.si, "sp": info.sp,
            "Ri": info.Ri, "Rp": info.Rp, "proto": info.proto,
            "framing": info.framing})

    def serve(self):
        """Run until told to stop, then drain."""
        ops = self._ops
        if self._options.listen:
            ops.run()
            self.stopped = True  # maybe by a handler of the routes file
        while not self.stopped and ops.conids():
            ops.step(0.1)  # and see whether a signal has come
        self.stopped = True
        if not ops.closed:
            ops.drain(self.drain_for)
        if not self._options.listen and not self.opened:
            raise Failure("no connection was made")

    def complain(self, failure):
        """Write a Failure to standard error."""
        self._err.line(f"{NAME}: {failure}")

    def finish(self):
        """Have the last lines read; return whether that went well."""
        ends = time.monotonic() + (0.1 if self.interrupted else 1)
        self.printed.finish()
        self._out.finish(ends - time.monotonic())
        log.removeHandler(self._err)
        why = self._out.failure
        if why and not isinstance(why, BrokenPipeError):  # as after "| head"
            self.complain(f"cannot write the events: {why.strerror}")
        self._err.finish(ends - time.monotonic())
        return not why

    # -- handlers -----------------------------------------------------------

    def _print(self, text, fields):
        """Write a line to standard output, for a person or a program."""
        if self._options.json:
            text = json.dumps({"time": round(time.time(), 3), **fields})
        if not self._options.quiet:
            self._out.line(text)

    def _report(self, kind, name, conid, text, fields):
        """Show an event or a message, and have followers know."""
        if kind in self._options.show:
            now = time.time()
            clock = time.strftime("%H:%M:%S", time.localtime(now))
            self._print(f"{clock}.{int(now % 1 * 1000):03d} {name:11} conid"
                        f" {conid}  {text}", fields)
        line = None
        for follower in [*self.followers]:
            if kind in follower.kinds:
                line = line or json.dumps(
                    {"time": round(time.time(), 3), **fields}).encode() + b"\n"
                follower.follow(line)

    def _place_of(self, conid, listener):
        return self._places.get(conid if listener is None else listener)

    def _option(self, name, where):
        return (getattr(self._options, name) if where is None
                else where.option(name, self._options))

    def _message(self, msg):
        fields = {"event": "message", "conid": msg.conid, "proto": msg.proto,
                  "si": msg.si, "sp": msg.sp, "Ri": msg.Ri, "Rp": msg.Rp,
                  "bytes": len(msg.data)}
        if self._options.json or self.followers:
            fields.update(data=msg.data.decode("latin-1"), text=msg.text)
        self._report("message", "message", msg.conid, f"{len(msg.data)} bytes "
                     f" {SHORT.repr(msg.payload)}", fields)
        if self._echoes(msg.conid):
            msg.reply(msg.payload)
        self.facade.message(msg)

    def _echoes(self, conid):
        """Whether a connection is to have its messages back."""
        # To ask for its listener takes system calls: only if it matters.
        if not any("echo" in place.own for place in self._places.values()):
            return self._options.echo
        info = self._ops.connection(conid)
        return info is not None and self._option(
            "echo", self._place_of(conid, info.listener))

    def _happened(self, event):
        fields = event._asdict()
        fields = {"event": fields.pop("name"), **fields}
        if not event.is_end:
            text = f"{event.proto} {format_address(event.si, event.sp)}"
            self._report("opened", event.name, event.conid, text, fields)
            self._set_up(event)
        else:
            text = (f"{event.reason}  {event.age:.1f} s, {event.bytes_in}"
                    f" bytes in, {event.bytes_out} out")
            if event.detail not in PLAIN_DETAILS:
                text += f"  ({event.detail})"
            fields["age"] = round(event.age, 3)
            self._ends.append({"time": round(time.time(), 3), **fields})
            self._report("end", event.name, event.conid, text, fields)
            self._places.pop(event.conid, None)
        self.facade.happened(event)

    def _set_up(self, event):
        """Give a new connection the settings of its place."""
        self.opened = True
        where = self._place_of(event.conid, event.listener)
        keepalive = self._option("keepalive", where)
        if keepalive:
            self._ops.tcp_keepalive_enable(*keepalive)
        if where is not None and "lifetime" in where.own:
            self._ops.tcp_set_connection_lifetime(where.own["lifetime"])

    # -- commands -----------------------------------------------------------

    def command(self, line):
        """Carry out a line: a generator of answers, the last with result."""
        name, _, rest = line.strip().partition(" ")
        tap = LogTap()
        log.addHandler(tap)
        try:
            if name.startswith("tcp_") and hasattr(tcpops.TcpOps, name):
                last = self._function(name, rest.split())
            elif name in self._commands:
                words = rest if name == "send" else rest.split()
                last = yield from self._apart(tap, self._commands[name](words))
            else:
                raise ValueError(f"no such command: {reprlib.repr(name)};"
                                 " try help")
        except ValueError as error:
            last = {"result": -1, "error": f"{name}: {error}"
                    if name in self._commands else str(error)}
        finally:
            log.removeHandler(tap)
        if tap.lines and "error" not in last:
            last["error"] = "; ".join(tap.lines[:3])
        yield {"command": name, **last}

    @staticmethod
    def _apart(tap, answers):
        """Yield a command's answers; meanwhile the tap collects nothing."""
        while True:
            log.addHandler(tap)
            try:
                answer = next(answers)
            except StopIteration as done:
                return done.value
            finally:
                log.removeHandler(tap)
            yield answer

    def _function(self, name, words):
        """Call a function of the specification."""
        result = getattr(self._ops, name)(*words)
        if isinstance(result, tcpops.State):
            return {"result": int(result), "state": result.name}
        return {"result": int(result)}

    def _matching(self, filters, listeners=False):
        """Yield the fields of the connections that pass; None for others."""
        for conid in filters.candidates(self._ops, listeners):
            info = self._ops.connection(conid)
            fields = info and describe(info, time.monotonic())
            yield fields if fields and filters.fit(fields) else None

    def _list(self, words):
        count = 0
        for fields in self._matching(Filters(words), listeners=True):
            count += fields is not None
            yield fields
        return {"result": 1, "count": count, "text": ""}

    def _to_each(self, words, function, done):
        """Call function(conid) for each connection that passes filters."""
        filters, count, failed = Filters(words), 0, 0
        if not words:
            raise ValueError("it takes a FILTER at least, such as proto=tls;"
                             " age>=0 is every connection")
        for fields in self._matching(filters):
            if fields is not None:
                went_well = function(fields["conid"])
                count, failed = count + bool(went_well), failed + (
                    not went_well)
            yield None
        text = f"{count} {done}" + (f", {failed} not" if failed else "")
        return {"result": -1 if failed else 1, "count": count, "text": text}

    def _close(self, words):
        return (yield from self._to_each(
            words, self._ops.tcp_close_connection, "closed"))

    def _lifetime(self, words):
        if not words:
            raise ValueError("it takes SECONDS FILTER...")
        value = seconds(words[0])
        return (yield from self._to_each(
            words[1:], lambda conid: self._ops.tcp_set_connection_lifetime(
                conid, value), "changed"))

    def _keepalive(self, words):
        if not words:
            raise ValueError("it takes IDLE,COUNT,INTERVAL FILTER..., or off")
        enable = self._ops.tcp_keepalive_disable
        if words[0] != "off":
            keepalive = keepalive_settings(words[0])
            enable = functools.partial(self._enable, keepalive)
        return (yield from self._to_each(words[1:], enable, "changed"))

    def _enable(self, keepalive, conid):
        return self._ops.tcp_keepalive_enable(conid, *keepalive)

    def _send(self, rest):
        conid, _, text = rest.strip().partition(" ")
        payload = unescape(text)
        with contextlib.suppress(UnicodeDecodeError):
            payload = payload.decode()  # a text message, to a WebSocket
        yield None
        return {"result": int(self._ops.send(conid, payload))}

    def _stats(self, words):
        if words:
            raise ValueError("it takes nothing")
        counts = self._ops.stats()
        live = counts["begun"] - sum(counts["ended"].values())
        yield {"version": tcpops.__version__, "pid": os.getpid(),
               "uptime": round(time.monotonic() - self.started, 3),
               "listeners": len(self._ops.listeners()), "connections": live,
               "followers": len(self.followers), **counts}
        return {"result": 1, "text": ""}

    def _list_ends(self, words):
        if len(words) > 1 or not all(word.isdecimal() for word in words):
            raise ValueError("it takes a number of ends, or nothing")
        ends = [*self._ends]
        count = min(int(words[0][:9]) if words else len(ends), len(ends))
        yield from ends[len(ends) - count:]
        return {"result": 1, "count": count, "text": ""}

    def _reload(self, words):
        if words:
            raise ValueError("it takes nothing")
        count, failures = 0, []
        for info in self._ops.listeners():
            where = self._places.get(info.conid)
            pair = self._pair(where) if where else (None, None)
            yield None
            try:
                context = server_context(*pair)
                if context is not None:
                    self._ops.set_tls(info.conid, context)
                    count += 1
                    log.info("conid %d has read its certificate", info.conid)
            except Failure as failure:
                failures.append(f"conid {info.conid} keeps its certificate:"
                                f" {failure}")
                log.error("%s", failures[-1])
        if failures:
            return {"result": -1, "count": count, "error": "; ".join(failures)}
        return {"result": 1, "count": count,
                "text": f"{count} listeners with TLS have read their files"}

    def _drain(self, words):
        if len(words) != 1:
            raise ValueError("it takes SECONDS")
        self.drain_for = seconds(words[0])
        yield None
        count = len(self._ops.conids())
        self.stop()
        return {"result": 1, "count": count,
                "text": f"{count} connections are drained"}

    def _quit(self, words):
        if words:
            raise ValueError("it takes nothing")
        yield None
        self.stop()
        return {"result": 1}

    def _follow(self, _words):
        yield None  # the client itself has taken the right ones
        raise ValueError("it takes opened, message or end, or nothing")

    def _help(self, _words):
        yield None
        return {"result": 1, "text": COMMANDS.strip() + "\n" + FILTERS}


# -- the control socket -------------------------------------------------------


class Client:
    """A client of the control socket: lines in, lines of JSON out."""

    def __init__(self, control, sock):
        self._control, self._sock = control, sock
        self._commands, self._unsent = bytearray(), bytearray()
        self._answer = None     # the generator of the answer that is made
        self._events = 0        # those that the loop selects
        self._gone = False      # it sends no more commands
        self.kinds = ()         # those that it follows
        self._lost = 0
        sock.setblocking(False)
        self._watch()

    def _watch(self):
        """Have the loop select the events that it needs next."""
        events = WRITE if self._unsent else 0
        # Who sends commands faster than they can be answered has to wait.
        if not self._gone and len(self._commands) <= LONGEST_COMMAND:
            events |= READ
        if not events and self._answer is None:
            self.close()
        elif events != self._events:
            if self._events:
                self._control.ops.dismiss(self._sock)
            if events:
                self._control.ops.attend(self._sock, events, self._ready)
            self._events = events

    def close(self):
        """Forget it."""
        if self._events:
            self._control.ops.dismiss(self._sock)
        self._events = 0
        self._answer, self._gone = None, True
        self._unsent.clear()
        self._control.forget(self)
        self._sock.close()

    def _ready(self, mask):
        try:
            if mask & READ:
                data = self._sock.recv(LONGEST_COMMAND)
                self._gone = not data
                if not data and self.kinds:
                    raise ConnectionError  # it no longer follows
                if not self.kinds:
                    self._commands += data
                    self._next()
            self.flush()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close()

    def flush(self):
        """Send as much as the socket takes; go on with the answer."""
        try:
            while self._unsent:
                del self._unsent[:self._sock.send(self._unsent)]
                if not self._unsent and self._lost:
                    self._tell_lost()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close()
            return
        if self._answer is not None and len(self._unsent) < UNSENT:
            self._control.go_on(self)
        self._watch()

    def _next(self):
        """Begin with the next command, if there is one and none runs."""
        if self._answer is not None or self.kinds:
            return
        line, newline, rest = self._commands.partition(b"\n")
        if not newline:
            if len(line) > LONGEST_COMMAND:
                raise ConnectionError("no command is that long")
            return
        self._commands = rest
        text = line.decode("utf-8", "surrogateescape").strip()
        name, *words = text.split() or [""]
        if name == "follow" and set(words) <= {"opened", "message", "end"}:
            self.kinds = tuple(words or ("opened", "message", "end"))
            self._commands.clear()
            self._control.server.followers.add(self)
        else:
            self._answer = self._control.server.command(text)
            self._control.go_on(self)

    def slice(self, until):
        """Make the answer, as far as time and room go."""
        while self._answer is not None and len(self._unsent) < UNSENT:
            item = next(self._answer, self)
            if item is self:
                self._answer = None
                self._next()
                break
            if item is not None:
                self._unsent += json.dumps(item).encode() + b"\n"
            if time.monotonic() >= until:
                break
        self.flush()

    def follow(self, line):
        """Send a line that it follows, or count it."""
        if len(self._unsent) > FOLLOWED:
            self._lost += 1
            return
        if self._lost:
            self._tell_lost()
        self._unsent += line
        self._control.touch(self)

    def _tell_lost(self):
        self._unsent += missing_json(self._lost).encode() + b"\n"
        self._lost = 0


class Control:
    """The control socket, served by the loop like everything else."""

    def __init__(self, path, ops, server):
        self.ops, self.server = ops, server
        self._path = path
        self._clients = set()
        self._busy = collections.deque()  # clients whose answer goes on
        self._working = False             # _work will be called
        self._touched = set()             # followers with something new
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self._sock = socket.socket(socket.AF_UNIX)
        try:
            self._remove_stale()
            umask = os.umask(0o177)  # mode 0600 from the first moment
            try:
                self._sock.bind(path)
            finally:
                os.umask(umask)
            self._inode = os.stat(path).st_ino
            self._sock.listen()
        except OSError as error:
            self._sock.close()
            raise Failure(f"cannot make {path}: {reason_of(error)}") from None
        self._sock.setblocking(False)
        ops.attend(self._sock, READ, self._accept)

    def _remove_stale(self):
        """Remove the socket of a program that was killed; spare the rest."""
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(self._path)
            except FileNotFoundError:
                return
            except ConnectionRefusedError:
                if not stat.S_ISSOCK(os.stat(self._path).st_mode):
                    raise OSError("it is no socket, and in the way") from None
                os.unlink(self._path)
                return
        raise OSError("a program answers there")

    def _accept(self, _mask):
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            return
        except OSError:
            # Out of descriptors, it would stay ready for ever: let go of the
            # spare one, take the client with it and turn it away.
            os.close(self._spare)
            with contextlib.suppress(OSError):
                self._sock.accept()[0].close()
            self._spare = os.open(os.devnull, os.O_RDONLY)
            return
        if len(self._clients) >= CLIENTS:
            with contextlib.suppress(OSError):
                sock.send(b'{"result": -1, "error": "too many clients"}\n')
            sock.close()
        else:
            self._clients.add(Client(self, sock))

    def forget(self, client):
        """Forget a client."""
        self._clients.discard(client)
        self._touched.discard(client)
        self.server.followers.discard(client)

    def go_on(self, client):
        """Go on with a client's answer, in its turn."""
        if client not in self._busy:
            self._busy.append(client)
        if not self._working:
            self._working = True
            self.ops.call_soon(self._work)

    def _work(self):
        """Take a slice of the answers: SLICE seconds of all together."""
        until = time.monotonic() + SLICE
        self._working = False
        for _ in range(len(self._busy)):
            # It puts itself behind the others if there is more to do.
            self._busy.popleft().slice(until)
            if time.monotonic() >= until:
                break

    def touch(self, client):
        """Send a follower's lines, together with the rest of a turn."""
        if not self._touched:
            self.ops.call_soon(self._flush_touched)
        self._touched.add(client)

    def _flush_touched(self):
        touched, self._touched = self._touched, set()
        for client in touched:
            client.flush()

    def close(self):
        """Remove the socket, unless the path is another one's by now."""
        for client in [*self._clients]:
            client.flush()  # the last events, if there is room
            client.close()
        self.ops.dismiss(self._sock)
        self._sock.close()
        os.close(self._spare)
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)


def call(words, as_json):
    """Carry out --call; return the exit status."""
    path, *command = words
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(path)
            line = " ".join(command).replace("\n", "\\n") + "\n"
            sock.sendall(line.encode("utf-8", "surrogateescape"))
            if command[0] == "follow":
                sock.settimeout(None)
            with sock.makefile(encoding="utf-8", newline="\n") as answers:
                for raw in answers:
                    answer = json.loads(raw)
                    if show_answer(answer, raw, as_json):
                        return 0 if answer["result"] > 0 else 1
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Failure(f"cannot call {path}: {reason_of(error)}") from None
    except (ValueError, KeyError, TypeError):
        raise Failure(f"cannot call {path}: no answer of {NAME}") from None
    if command[0] == "follow":
        return 0  # the server has left
    raise Failure(f"cannot call {path}: no answer of {NAME}")


def show_answer(answer, raw, as_json):
    """Print a line of an answer; return whether it is the last one."""
    last = "result" in answer
    if as_json:
        text = raw.rstrip("\n")
    elif not last:
        text = format_fields(answer)
    elif "state" in answer:
        text = f"{answer['result']} {answer['state']}"
    else:
        text = answer.get("text", str(answer["result"]))
    if text:
        print(text, flush=True)
    if "error" in answer:
        print(answer["error"], file=sys.stderr)
    return last


# -- main ---------------------------------------------------------------------


@contextlib.contextmanager
def signals(server):
    """Have signals stop the server, and SIGHUP reload."""
    handlers = {signal.SIGINT: server.interrupt,
                signal.SIGTERM: server.interrupt}
    if hasattr(signal, "SIGHUP"):  # Windows has none
        handlers[signal.SIGHUP] = server.hang_up
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # we are leaving


def run(server, options, ops):
    """Serve until told to stop."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(ops)
        if options.routes:
            stack.enter_context(contextlib.redirect_stdout(server.printed))
            load_routes(options.routes, server.facade)
        if options.control:
            stack.enter_context(contextlib.closing(
                Control(options.control, ops, server)))
        for where in options.listen or ():
            server.listen(where)
        for where in options.connect or ():
            server.connect(where)
        server.serve()


def main(argv=None):
    """Run the command line; return the exit status.  See --help."""
    parser, options = parse(argv)
    try:
        if options.call is not None:
            return call(options.call, options.json)
        ops = tcpops.TcpOps(closed_event=options.closed_event,
                            connection_lifetime=options.lifetime,
                            max_connections=options.max_connections)
    except Failure as failure:
        parser.exit(1, f"{NAME}: {failure}\n")
    except ValueError as error:
        parser.error("--" + str(error).removeprefix("connection_").replace(
            "_", "-"))
    server, status = Server(options, ops), 0
    with signals(server):
        try:
            try:
                run(server, options, ops)
            except Failure as failure:
                server.complain(failure)
                status = 1
            finally:
                if not server.finish():
                    status = 1
        except KeyboardInterrupt:
            status = 130
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # of --call, as after "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
