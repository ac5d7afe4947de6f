"""A short default lifetime, one connection raised, one lowered.

    python3 examples/lifetime.py [--slow]

With --slow each limit takes ten times as long.

Prints:
    conid 4 ended: idle for 0.1 s
    conid 3 speaks: its 0.6 s start anew
    conid 2 ended: idle for 0.3 s
    conid 3 ended: idle for 0.6 s
"""

from slow import pace, soon  # first: it finds tcpops.py, too

import socket

import tcpops

ops = tcpops.TcpOps(connection_lifetime=0.3 * pace)  # seconds idle


@ops.request_route
def request(msg):
    lifetime = ops.connection(msg.conid).lifetime
    print(f"conid {msg.conid} speaks: its {lifetime:g} s start anew")


@ops.event_route("tcp:timeout")
def timeout(event):
    print(f"conid {event.conid} ended: {event.detail}")
    if event.conid == 4:
        soon("the peer of conid 3 speaks")
        clients[1].sendall(b"I am still here")  # conid 3


listener = ops.connection(ops.listen("127.0.0.1", 0))
clients = []
for _ in range(3):
    clients.append(socket.create_connection((listener.Ri, listener.Rp)))
    ops.step(timeout=1)
soon("conid 3 gets twice the lifetime, conid 4 a third")
ops.tcp_set_connection_lifetime(3, 0.6 * pace)
ops.tcp_set_connection_lifetime(4, 0.1 * pace)
while ops.connections():
    ops.step(timeout=1)
ops.close()
for client in clients:
    client.close()
