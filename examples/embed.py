"""Another event loop drives it: asyncio, by fileno() and next_deadline().

    python3 examples/embed.py [--slow]

Prints:
    asyncio's client got b'HELLO'
    conid 2 ended: idle for 0.2 s
"""

from slow import soon  # first: it finds tcpops.py, too

import asyncio

import tcpops

ops = tcpops.TcpOps()  # its clock is asyncio's clock: time.monotonic


@ops.request_route
def request(msg):
    msg.reply(msg.data.upper())
    ops.tcp_set_connection_lifetime(0.2)


async def main():
    loop = asyncio.get_running_loop()
    timer, ended = loop.call_soon(ops.step, 0), loop.create_future()
    ops.event_route("tcp:closed")(ended.set_result)

    def turn():
        nonlocal timer
        ops.step(0)
        timer.cancel()
        due = ops.next_deadline() or loop.time() + 60
        timer = loop.call_at(due, turn)

    loop.add_reader(ops.fileno(), turn)  # readable whenever there is work
    port = ops.connection(ops.listen("127.0.0.1", 0)).Rp
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    soon("asyncio's client speaks; the answer sets a lifetime")
    writer.write(b"hello")
    print("asyncio's client got", await reader.read(100))
    print(f"conid 2 ended: {(await ended).detail}")
    writer.close()


asyncio.run(main())
ops.close()
