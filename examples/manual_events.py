"""closed_event=2: only a connection that asked for it has its end told.

The specification's example 1.7: a phone that registers gets its end told.

    python3 examples/manual_events.py [--slow]

Prints:
    conid 2 registers: 1
    connection 2 was closed
    conid 3 says b'hello'
"""

from slow import soon  # first: it finds tcpops.py, too

import socket

import tcpops

ops = tcpops.TcpOps()
ops.modparam("tcpops", "closed_event", 2)


@ops.request_route
def request(msg):
    if msg.data.startswith(b"REGISTER"):
        # No conid: the connection that the message came from.
        print(f"conid {msg.conid} registers:", ops.tcp_enable_closed_event())
    else:
        print(f"conid {msg.conid} says {msg.data}")


@ops.event_route("tcp:closed")
def closed(event):
    print(f"connection {ops.conid} was closed")


listener = ops.connection(ops.listen("127.0.0.1", 0))
for text in (b"REGISTER me", b"hello"):
    client = socket.create_connection((listener.Ri, listener.Rp))
    soon(f"a peer sends {text}, and closes")
    client.sendall(text)
    client.close()
    ended = sum(ops.stats()["ended"].values())
    while sum(ops.stats()["ended"].values()) == ended:
        ops.step(timeout=1)
ops.close()
