"""A peer does not read: its window shuts, our queue fills, send refuses.

    python3 examples/shut_window.py [--slow]

Prints:
    send refuses: -1, for our queue is full
    the state is 1 OK: the peer's kernel lives, and says that it has no room
    the peer reads: every byte that send took has come, in order
    our queue holds 0 bytes
    send: 1
"""

from slow import soon  # first: it finds tcpops.py, too

import contextlib
import itertools
import socket

import tcpops

ops = tcpops.TcpOps(max_write_buffer=100000, send_timeout=60)
listener = ops.connection(ops.listen("127.0.0.1", 0))
peer = socket.create_connection((listener.Ri, listener.Rp))
ops.step(timeout=1)

soon("we send until nothing more is taken")
taken = bytearray()
for number in itertools.count():
    payload = str(number).encode() * 10000
    result = ops.send(2, payload)
    if not result:
        break
    taken += payload  # by the peer's kernel, ours, or our queue
print(f"send refuses: {result}, for our queue is full")
soon("we ask for the state")
state = ops.tcp_conid_state(2)
print(f"the state is {state} {state.name}: the peer's kernel lives, and says"
      " that it has no room")

soon("the peer reads")
read = bytearray()
peer.setblocking(False)  # our loop must turn meanwhile
while len(read) < len(taken):
    ops.step(timeout=0.01)
    with contextlib.suppress(BlockingIOError):
        read += peer.recv(1 << 20)
assert read == taken
print("the peer reads: every byte that send took has come, in order")
print(f"our queue holds {ops.connection(2).queued} bytes")
print("send:", int(ops.send(2, b"more")))
ops.close()
peer.close()
