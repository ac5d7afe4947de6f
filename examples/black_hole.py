"""Connecting to where no one answers, and to where no one listens.

    python3 examples/black_hole.py [--slow]

With --slow each limit takes ten times as long.

Prints:
    connecting to a port on which no one listens
      tcp:reset (Connection refused): an RST came at once
    connecting to a black hole
      after half the time: 3 CONNECT, alive: 1
      tcp:timeout (no answer in 0.6 s): nothing came at all
"""

from slow import pace, soon  # first: it finds tcpops.py, too

import socket

import tcpops
from vanish import full_backlog

ops = tcpops.TcpOps(connect_timeout=0.6 * pace)
ends = []
ops.event_route("tcp:closed")(ends.append)  # of every kind


def connect(where, address):
    soon(f"we connect to {where}")
    print("connecting to", where, flush=True)
    return ops.connect(*address)


taken = socket.socket()
taken.bind(("127.0.0.1", 0))  # and does not listen
connect("a port on which no one listens", taken.getsockname())
while not ends:
    ops.step(timeout=1)
print(f"  {ends[0].name} ({ends[0].detail}): an RST came at once")

# The queue of this listener is full, so its kernel drops what comes in.
hole = full_backlog()[0]
conid = connect("a black hole", hole.getsockname())
ops.step(timeout=0.3 * pace)
state = ops.tcp_conid_state(conid)
print(f"  after half the time: {state} {state.name},"
      f" alive: {ops.tcp_conid_alive(conid)}", flush=True)
while len(ends) < 2:
    ops.step(timeout=1)
print(f"  {ends[1].name} ({ends[1].detail}): nothing came at all")
ops.close()
taken.close()
