"""send_timeout and message_timeout, each against one kind of slow peer.

    python3 examples/timeouts.py [--slow]

A lifetime ends neither: both connections are busy all the time.  With --slow
each limit takes ten times as long.

Prints:
    conid 2, whose peer drips: tcp:timeout, message
      (message not complete after 0.4 s)
    conid 3, whose peer does not read: tcp:timeout, send
      (its queue made no progress for 0.4 s, and its state was OK)
"""

from slow import pace, soon  # first: it finds tcpops.py, too

import socket

import tcpops

LIMIT = 0.4 * pace
ops = tcpops.TcpOps(send_timeout=LIMIT, message_timeout=LIMIT)
ends = []
ops.event_route("tcp:timeout")(ends.append)
listener = ops.connection(ops.listen("127.0.0.1", 0, framing="line"))
clients = []
for _ in range(2):
    clients.append(socket.create_connection((listener.Ri, listener.Rp)))
    ops.step(timeout=1)
dripping, deaf = clients

soon(f"a peer sends a byte every {LIMIT / 4} s, but never the end of a line")
while not ends:
    dripping.send(b"x")
    ops.step(timeout=1)          # the byte comes
    ops.step(timeout=LIMIT / 4)  # nothing else does, until a limit is reached
(end,) = ends
print(f"conid {end.conid}, whose peer drips: {end.name}, {end.reason}")
print(f"  ({end.detail})", flush=True)

soon("we send 8 MB to a peer that reads nothing")
ops.send(3, bytes(1 << 23))
while len(ends) < 2:
    state = ops.tcp_conid_state(3)  # the last one before the end stays
    ops.step(timeout=1)
end = ends[1]
print(f"conid {end.conid}, whose peer does not read: {end.name}, {end.reason}")
print(f"  (its queue made no progress for {LIMIT:g} s,"
      f" and its state was {state.name})")
ops.close()
for client in clients:
    client.close()
