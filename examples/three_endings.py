"""Three connections, three ways to end, and the handler that runs for each.

    python3 examples/three_endings.py [--slow]

Prints:
    conid 2: tcp:closed, eof (FIN from the peer)
    conid 3: tcp:reset, reset (Connection reset by peer)
    conid 4: tcp:timeout, lifetime (idle for 0.2 s)
"""

from slow import soon  # first: it finds tcpops.py, too

import socket
import struct

import tcpops

ops = tcpops.TcpOps()


@ops.event_route("tcp:closed")
@ops.event_route("tcp:reset")
@ops.event_route("tcp:timeout")
def ended(event):
    print(f"conid {event.conid}: {event.name}, {event.reason}"
          f" ({event.detail})")


listener = ops.connection(ops.listen("127.0.0.1", 0))
clients = []
for _ in range(3):
    clients.append(socket.create_connection((listener.Ri, listener.Rp)))
    ops.step(timeout=1)
one_closes, one_resets, one_idles = clients

soon("the peer of conid 2 closes")
one_closes.close()
ops.step(timeout=1)

soon("the peer of conid 3 resets")
# SO_LINGER with a time of 0 makes close() send RST instead of FIN.
one_resets.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                      struct.pack("ii", 1, 0))
one_resets.close()
ops.step(timeout=1)

soon("we set the lifetime of conid 4, which is idle")
ops.tcp_set_connection_lifetime(4, 0.2)
ops.step(timeout=1)
ops.close()
one_idles.close()
