"""From a peer's address to the conid, and how forward() uses that.

    python3 examples/find_by_address.py [--slow]

Prints:
    by host:port: 2
    by a SIP URI: 2
    by a name: 2
    of a stranger: -1
    alive: 1
    forwarded: 1, and the peer got b'over the connection that is there'
    that made 1 connection, no second one
    without a port it is 5060: ('10.0.0.1', 5060)
"""

from slow import soon  # first: it finds tcpops.py, too

import socket

import tcpops

ops = tcpops.TcpOps()
listener = ops.connection(ops.listen("127.0.0.1", 0))
phone = socket.create_connection((listener.Ri, listener.Rp))
ops.step(timeout=1)
address = "127.0.0.1:%d" % phone.getsockname()[1]

soon(f"we look for the phone at {address}")
print("by host:port:", ops.tcp_get_conid(address))
print("by a SIP URI:",
      ops.tcp_get_conid(f"sip:alice@{address};transport=tcp"))
print("by a name:",
      ops.tcp_get_conid(address.replace("127.0.0.1", "localhost")))
print("of a stranger:", ops.tcp_get_conid("127.0.0.1:9"))
print("alive:", ops.tcp_con_alive(address))
soon("we forward to that address")
result = ops.forward(address, b"over the connection that is there")
print(f"forwarded: {result}, and the peer got {phone.recv(100)}")
print(f"that made {len(ops.connections())} connection, no second one")
print("without a port it is 5060:", tcpops.parse_address("sip:10.0.0.1"))
ops.close()
phone.close()
