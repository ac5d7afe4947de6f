"""Keepalive by conid: set, read back from the kernel, refused, turned off.

    python3 examples/keepalive.py [--slow]

Prints:
    before: None
    enable 60, 5, 5: 1
    the kernel has: Keepalive(idle=60, count=5, interval=5)
    a peer silent for 85 s has vanished
    enable 60, 999, 5: -1
    the kernel still has: Keepalive(idle=60, count=5, interval=5)
    disable: 1
    after: None
"""

from slow import soon  # first: it finds tcpops.py, too

import logging
import socket

import tcpops

logging.disable()  # the log would say why the impossible is refused
ops = tcpops.TcpOps()
server = socket.create_server(("127.0.0.1", 0))
conid = ops.connect(*server.getsockname())
ops.step(timeout=1)


def kernel():
    return ops.connection(conid).keepalive


print("before:", kernel())
soon("we turn keepalive on")
print("enable 60, 5, 5:", ops.tcp_keepalive_enable(conid, 60, 5, 5))
print("the kernel has:", kernel())
print(f"a peer silent for {kernel().limit} s has vanished")
soon("we ask for more than the kernel can do")
print("enable 60, 999, 5:", ops.tcp_keepalive_enable(conid, 60, 999, 5))
print("the kernel still has:", kernel())
soon("we turn it off")
print("disable:", ops.tcp_keepalive_disable(conid))
print("after:", kernel())
ops.close()
server.close()
