"""The specification's examples: Kamailio's line, and ours with its result.

    python3 examples/from_kamailio.py [--slow]

Prints:
    1.1 Set closed_event parameter
        modparam("tcpops", "closed_event", 0)
        ops.modparam("tcpops", "closed_event", 0)  ->  None
    1.2 tcp_conid_alive usage
        if(!tcp_conid_alive("$var(conid)")) { ... }
        not ops.tcp_conid_alive(conid)  ->  True
    1.3 tcp_conid_state usage
        if(!tcp_conid_state("$var(conid)")) { ... }
        not ops.tcp_conid_state(conid)  ->  True
    1.4 tcp_keepalive_enable usage
        $avp(caller_conid) = $conid;
        avp.setdefault("caller_conid", ops.conid)  ->  3
        tcp_keepalive_enable("60", "5", "5");
        ops.tcp_keepalive_enable("60", "5", "5")  ->  1
        tcp_keepalive_enable("$avp(caller_conid)", "60", "5", "2");
        ops.tcp_keepalive_enable(avp["caller_conid"], "60", "5", "2")  ->  1
    1.5 tcp_keepalive_disable usage
        $avp(bye_conid) = $conid;
        avp.setdefault("bye_conid", ops.conid)  ->  3
        tcp_keepalive_disable();
        ops.tcp_keepalive_disable()  ->  1
        tcp_keepalive_disable("$avp(bye_conid)");
        ops.tcp_keepalive_disable(avp["bye_conid"])  ->  1
    1.6 tcp_set_connection_lifetime usage
        tcp_connection_lifetime=10
        setattr(ops, "connection_lifetime", 10)  ->  None
        tcp_set_connection_lifetime("3605");
        ops.tcp_set_connection_lifetime("3605")  ->  1
    1.7 tcp_set_closed_event usage
        modparam("tcpops", "closed_event", 2)
        ops.modparam("tcpops", "closed_event", 2)  ->  None
        tcp_enable_closed_event();
        ops.tcp_enable_closed_event()  ->  1
        xlog("connection $conid was closed");
        print(f"connection {ops.conid} was closed")
    connection 5 was closed
    4.1 the last one
        xlog("L_INFO", "TCP connection closed ($conid)\\n");
        print(f"TCP connection closed ({ops.conid})")
    TCP connection closed (6)
"""

from slow import soon  # first: it finds tcpops.py, too

import socket

import tcpops

ops = tcpops.TcpOps()
avp, example = {}, None


def both(original, ours):
    """Show the original's line, run ours and show what it returned."""
    print(f"    {original}")
    if ours.startswith("print"):
        print(f"    {ours}", flush=True)
        eval(ours)
    else:
        print(f"    {ours}  ->  {eval(ours)}")


@ops.request_route
def request_route(msg):
    if msg.method == "INVITE":
        both("$avp(caller_conid) = $conid;",
             'avp.setdefault("caller_conid", ops.conid)')
    elif msg.method == "BYE":
        both("$avp(bye_conid) = $conid;",
             'avp.setdefault("bye_conid", ops.conid)')
    elif msg.method == "REGISTER" and example == "1.6":
        both('tcp_set_connection_lifetime("3605");',
             'ops.tcp_set_connection_lifetime("3605")')
    elif msg.method == "REGISTER" and example == "1.7":
        both("tcp_enable_closed_event();", "ops.tcp_enable_closed_event()")


@ops.onreply_route
def onreply_route(msg):  # of the callee's connection
    if msg.header("CSeq") == "1 INVITE" and msg.status == 200:
        both('tcp_keepalive_enable("60", "5", "5");',
             'ops.tcp_keepalive_enable("60", "5", "5")')
        both('tcp_keepalive_enable("$avp(caller_conid)", "60", "5", "2");',
             'ops.tcp_keepalive_enable(avp["caller_conid"], "60", "5", "2")')
    elif msg.header("CSeq") == "1 BYE" and msg.status == 200:
        both("tcp_keepalive_disable();", "ops.tcp_keepalive_disable()")
        both('tcp_keepalive_disable("$avp(bye_conid)");',
             'ops.tcp_keepalive_disable(avp["bye_conid"])')


@ops.event_route("tcp:closed")
def closed(event):
    if example == "1.7":
        both('xlog("connection $conid was closed");',
             'print(f"connection {ops.conid} was closed")')
    else:
        both(r'xlog("L_INFO", "TCP connection closed ($conid)\n");',
             'print(f"TCP connection closed ({ops.conid})")')


def title(number, what):
    global example
    example = number
    soon(f"the specification's example {number}")
    print(number, what)


def step_until_it_changes(name):
    before = ops.stats()[name]
    while ops.stats()[name] == before:
        ops.step()


def connect():
    """Connect; return the client's socket, once its conid is there."""
    sock = socket.create_connection((listener.Ri, listener.Rp))
    step_until_it_changes("opened")
    return sock


def say(sock, start, method):
    """Send a SIP message, and have it handled."""
    sock.sendall(f"{start}\r\nCSeq: 1 {method}\r\nContent-Length: 0\r\n\r\n"
                 .encode())
    step_until_it_changes("bytes_in")


def close(sock):
    sock.close()
    step_until_it_changes("ended")


title("1.1", "Set closed_event parameter")
both('modparam("tcpops", "closed_event", 0)',
     'ops.modparam("tcpops", "closed_event", 0)')
listener = ops.connection(ops.listen("127.0.0.1", 0, framing="sip"))
close(connect())
conid = 2  # has been, and is no more
title("1.2", "tcp_conid_alive usage")
both('if(!tcp_conid_alive("$var(conid)")) { ... }',
     "not ops.tcp_conid_alive(conid)")
title("1.3", "tcp_conid_state usage")
both('if(!tcp_conid_state("$var(conid)")) { ... }',
     "not ops.tcp_conid_state(conid)")
caller, callee = connect(), connect()
title("1.4", "tcp_keepalive_enable usage")
say(caller, "INVITE sip:alice@example.com SIP/2.0", "INVITE")
say(callee, "SIP/2.0 200 OK", "INVITE")
title("1.5", "tcp_keepalive_disable usage")
say(caller, "BYE sip:alice@example.com SIP/2.0", "BYE")
say(callee, "SIP/2.0 200 OK", "BYE")
title("1.6", "tcp_set_connection_lifetime usage")
both("tcp_connection_lifetime=10", 'setattr(ops, "connection_lifetime", 10)')
say(caller, "REGISTER sip:example.com SIP/2.0", "REGISTER")
title("1.7", "tcp_set_closed_event usage")
both('modparam("tcpops", "closed_event", 2)',
     'ops.modparam("tcpops", "closed_event", 2)')
client = connect()
say(client, "REGISTER sip:example.com SIP/2.0", "REGISTER")
close(client)
title("4.1", "the last one")
ops.modparam("tcpops", "closed_event", 1)
close(connect())
ops.closed_event = 0  # those that are left end unheard
ops.close()
caller.close()
callee.close()
