"""Two peers vanish; keepalive finds one, and no one asks about the other.

    python3 examples/vanished_peer.py [--slow]

Prints:
    both peers vanish: not a single segment says so
    conid 2 ended: tcp:timeout, keepalive (Connection timed out)
    conid 1, without keepalive: 1 OK, alive: 1
"""

from slow import soon  # first: it finds tcpops.py, too

import socket
import sys

import tcpops
from vanish import go_there, vanish

try:
    go_there()  # where the kernel may drop for us what comes in
except OSError as error:
    sys.exit(f"a peer that vanishes needs root, or unshare -Urn: {error}")
ops = tcpops.TcpOps()


@ops.event_route("tcp:timeout")
def ended(event):
    print(f"conid {event.conid} ended: {event.name}, {event.reason}"
          f" ({event.detail})")
    ops.stop()


server = socket.create_server(("127.0.0.1", 0))
peers = []
for _ in range(2):
    ops.connect(*server.getsockname())
    peers.append(server.accept()[0])
    ops.step(timeout=1)
soon("both peers vanish; conid 2 has keepalive, conid 1 has not")
for peer in peers:
    vanish(peer)
print("both peers vanish: not a single segment says so", flush=True)
ops.tcp_keepalive_enable(2, 1, 1, 1)  # idle 1 s, 1 probe, 1 s for its answer
ops.run()  # until ended() stops it
soon("we ask for the state of conid 1, whose peer is gone as well")
state = ops.tcp_conid_state(1)
print(f"conid 1, without keepalive: {state} {state.name},"
      f" alive: {ops.tcp_conid_alive(1)}")
ops.close()
for sock in (server, *peers):
    sock.close()
