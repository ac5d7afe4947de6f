"""One connection walked through its states: 3, 1, -2, -1.

    python3 examples/states.py [--slow]

Prints:
    while connecting: 3 CONNECT, alive: 1
    connected: 1 OK, alive: 1
    the peer has sent FIN: -2 EOF, alive: -1
    in the handler of its end: -2 EOF, alive: -1
    afterwards: -1 NOT_FOUND, alive: -1
    the listener, by comparison: 2 ACCEPT, alive: 1
"""

from slow import soon  # first: it finds tcpops.py, too

import socket

import tcpops

ops = tcpops.TcpOps()


def show(when, conid):
    state = ops.tcp_conid_state(conid)
    print(f"{when}: {state} {state.name}, alive: {ops.tcp_conid_alive(conid)}")


@ops.event_route("tcp:closed")
def closed(event):
    show("in the handler of its end", event.conid)


server = socket.create_server(("127.0.0.1", 0))
soon("we connect")
conid = ops.connect(*server.getsockname())
show("while connecting", conid)
soon("the loop turns, and learns the outcome")
ops.step(timeout=1)
show("connected", conid)
peer, _ = server.accept()
soon("the peer closes")
peer.close()
show("the peer has sent FIN", conid)  # the loop has not read it yet
soon("the loop turns, and reports the end")
ops.step(timeout=1)
show("afterwards", conid)
show("the listener, by comparison", ops.listen("127.0.0.1", 0))
ops.close()
server.close()
