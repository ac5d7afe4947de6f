"""A SIP server: answers, registers, relays calls and watches their two legs.

    python3 examples/sip_server.py [--slow]
    python3 examples/sip_server.py --listen 127.0.0.1:5060
        stays up; then try, each in a terminal of its own:
        sipp -sn uas -t t1 -i 127.0.0.1 -p 5070 -m 100
        sipp -sn uac -t t1 -i 127.0.0.1 -m 100 \
            -rsa 127.0.0.1:5060 127.0.0.1:5070

An INVITE goes to the connection on which its user has registered, else to
where its Request-URI points.  With that it relays for everybody: an example,
and no proxy to be left alone on the Internet.

Prints:
    OPTIONS: 200
    REGISTER: 200, lifetime of conid 3 now 3605 s
    INVITE relayed from conid 2 to conid 3
    INVITE: 200, keepalive of 3 and 2 is 60,5,5 and 60,5,2
    BYE: 200, keepalive of 3 and 2 is None and None
"""

from slow import options, soon  # first: it finds tcpops.py, too

import contextlib
import ipaddress
import re
import socket
import sys

import tcpops

# Example 1.6 of the specification: 10 s as the default lifetime.
ops = tcpops.TcpOps(connection_lifetime=10)
users = {}  # user: the conid of its connection
calls = {}  # (callee's conid, Call-ID): (caller's conid, request if pending)


def show(*words):
    if not options.listen:
        print(*words)


def lines_of(msg, *names):
    """Return a message's header lines of these names; it may lack some."""
    return [f"{name}: {value}" for name in names
            for value in msg.headers(name)]


def answer(msg, status, *extra):
    """Answer a request without relaying it."""
    lines = lines_of(msg, "Via", "From", "Call-ID", "CSeq")
    for to in lines_of(msg, "To"):
        # Within a dialog it has our tag (RFC 3261, 8.2.6.2); a parameter in
        # the angle brackets is the URI's.
        own = re.sub(r'"(?:\\.|[^"\\])*"|<[^>]*>', "", to)
        has_tag = re.search(r";[ \t]*tag[ \t]*=", own, re.IGNORECASE)
        lines.append(to if has_tag else f"{to};tag=tcpops-{msg.conid}")
    msg.reply("\r\n".join([f"SIP/2.0 {status}", *lines, *extra,
                           "Content-Length: 0"]) + "\r\n\r\n")


def user_of(uri):
    """Return the user part of the URI in a header, "" if there is none."""
    match = re.search(r"sips?:([^@:;>\s]+)[:@]", uri or "")
    return match[1] if match else ""


@ops.request_route
def on_request(msg):
    user = user_of(msg.uri)
    if msg.method == "REGISTER":
        if user_of(msg.header("To")):
            users[user_of(msg.header("To"))] = msg.conid
        # Example 1.6: raise the lifetime of who has registered.
        ops.tcp_set_connection_lifetime("3605")
        answer(msg, "200 OK", *lines_of(msg, "Contact"), "Expires: 3600")
    elif users.get(user) or not is_ours(msg.uri):
        relay(msg, users.get(user))
    elif msg.method == "OPTIONS":
        answer(msg, "200 OK", "Allow: OPTIONS, REGISTER, INVITE, ACK, BYE")
    elif msg.method != "ACK":  # which has no answer
        answer(msg, "404 Not Found")


def is_ours(uri):
    """Whether a Request-URI is for this server itself.

    So is a name: to look it up would keep everybody waiting.
    """
    try:
        host, port = tcpops.parse_address(uri)
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return (host, port) == (listener.Ri, listener.Rp)


def relay(msg, conid):
    """Send a request on, with a Via that names the caller's connection."""
    branch = re.search(r"branch=(?:z9hG4bK)?([^;,\s]*)",
                       msg.header("Via") or "")
    start, _, rest = msg.data.partition(b"\r\n")
    via = (f"Via: SIP/2.0/TCP {listener.Ri}:{listener.Rp}"
           f";branch=z9hG4bKconid{msg.conid}-{branch[1] if branch else ''}")
    data = b"%s\r\n%s\r\n%s" % (start, via.encode(), rest)
    sent = (ops.send(conid, data) if conid else ops.forward(msg.uri, data))
    # None is found where the connect was refused meanwhile, as on loopback.
    callee = sent and (conid or ops.tcp_get_conid(msg.uri))
    if msg.method != "ACK" and callee > 0:
        calls[callee, msg.header("Call-ID")] = msg.conid, msg
    elif msg.method != "ACK":
        answer(msg, "503 Service Unavailable")
    if sent and msg.method == "INVITE":
        show(f"INVITE relayed from conid {msg.conid} to conid {conid}")


OURS = re.compile(rb"^(Via[ \t]*:[ \t]*)SIP/2\.0/TCP [^;,\r\n]*;branch="
                  rb"z9hG4bKconid(\d{1,15})-[^,\r\n]*(?:\r\n|,[ \t]*())",
                  re.IGNORECASE | re.MULTILINE)


@ops.onreply_route
def on_reply(msg):
    ours = OURS.search(msg.data)
    call = msg.conid, msg.header("Call-ID")
    caller, request = calls.get(call, (None, None))
    if not ours or caller != int(ours[2]):
        return  # nobody has asked for it
    prefix = ours[1] if ours[3] is not None else b""
    method = (msg.header("CSeq") or "").rpartition(" ")[2]
    if (msg.status or 0) >= 200:
        calls[call] = caller, None  # answered
        if method != "INVITE" or msg.status >= 300:
            del calls[call]
    if msg.status == 200 and method == "INVITE":
        # Example 1.4: enable on callee's connection, then on caller's.
        ops.tcp_keepalive_enable("60", "5", "5")
        ops.tcp_keepalive_enable(caller, "60", "5", "2")
        # A call may be silent for longer than 10 s.
        ops.tcp_set_connection_lifetime("3605")
        ops.tcp_set_connection_lifetime(caller, "3605")
    elif msg.status == 200 and method == "BYE":
        # Example 1.5: disable on both.
        ops.tcp_keepalive_disable()
        ops.tcp_keepalive_disable(caller)
    ops.send(caller, msg.data[:ours.start()] + prefix + msg.data[ours.end():])


@ops.event_route("tcp:closed")
def closed(event):
    for user in [user for user in users if users[user] == event.conid]:
        del users[user]
    for callee, call_id in [*calls]:
        caller, request = calls[callee, call_id]
        if event.conid in (caller, callee):
            del calls[callee, call_id]
            if event.conid == callee and request is not None:
                answer(request, "503 Service Unavailable",
                       f"Warning: 399 tcpops \"{event.reason}\"")


listener = ops.connection(ops.listen(
    *(options.listen or ("127.0.0.1", 0)),
    framing="sip"))
if options.listen:
    print(f"listening on {listener.Ri}:{listener.Rp}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        ops.run()
    ops.drain(1)
    sys.exit()


# -- a caller and a callee, to show it ----------------------------------------

def request(method, user):
    return (f"{method} sip:{user}@{listener.Ri}:{listener.Rp} SIP/2.0\r\n"
            f"Via: SIP/2.0/TCP 127.0.0.1;branch=z9hG4bK{method}\r\n"
            "From: <sip:bob@example.com>;tag=1\r\n"
            f"To: <sip:{user}@example.com>\r\nCall-ID: 1\r\n"
            f"CSeq: 1 {method}\r\nContact: <sip:{user}@127.0.0.1>\r\n"
            "Content-Length: 0\r\n\r\n").encode()


def talk(sender, data, receiver):
    """Send data, return what arrives at the receiver."""
    sender.sendall(data)
    receiver.setblocking(False)
    while True:
        ops.step(0.01)
        try:
            return receiver.recv(65536)
        except BlockingIOError:
            pass


def settings(conid):
    keepalive = ops.connection(conid).keepalive
    return keepalive and ",".join(map(str, keepalive))


bob = socket.create_connection((listener.Ri, listener.Rp))
soon("bob asks for OPTIONS")
print("OPTIONS:", talk(bob, request("OPTIONS", ""), bob)[8:11].decode())
alice = socket.create_connection((listener.Ri, listener.Rp))
soon("alice registers")
status = talk(alice, request("REGISTER", "alice"), alice)[8:11].decode()
print(f"REGISTER: {status}, lifetime of conid 3 now"
      f" {ops.connection(3).lifetime} s")
for method in ("INVITE", "BYE"):
    soon(f"bob sends {method}, and alice answers")
    relayed = talk(bob, request(method, "alice"), alice)
    headers = relayed.partition(b"\r\n")[2]
    status = talk(alice, b"SIP/2.0 200 OK\r\n" + headers, bob)[8:11].decode()
    print(f"{method}: {status}, keepalive of 3 and 2 is {settings(3)} and"
          f" {settings(2)}")
bob.close()
alice.close()
ops.close()
