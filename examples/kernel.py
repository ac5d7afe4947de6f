"""The kernel's own record of each connection, by its trace points.

storm.py lets it judge with --witness, and deaths.py shows it with --kernel.
It needs root, Linux and tracefs.
"""

import collections
import os
import re
import subprocess

#: Which terminal fact came first: a change of state, an RST, an error.
FACTS = ("sock/inet_sock_set_state", "tcp/tcp_receive_reset",
         "sock/inet_sk_error_report")
#: Data that came in, and segments that had to be sent again.
SEGMENTS = ("tcp/tcp_probe", "tcp/tcp_retransmit_skb")
#: What a record says, and the word for it.
WORDS = ((r"tcp_receive_reset: ", "RST"), (r" error=(\d+)", r"error \1"),
         (r"oldstate=(\w+) newstate=(?!\1)TCP_(\w+)", r"\2"),
         (r"tcp_retransmit_skb: ", "again"),
         (r"data_len=([1-9]\d*)", r"\1 bytes"))


class Kernel:
    """A private instance of the kernel's trace points."""

    ROOT = "/sys/kernel/tracing"

    def __init__(self, points=FACTS):
        if not os.path.isdir(f"{self.ROOT}/events"):
            subprocess.run(["mount", "-t", "tracefs", "none", self.ROOT],
                           stderr=subprocess.DEVNULL)
        self.path = f"{self.ROOT}/instances/tcpops{os.getpid()}"
        os.mkdir(self.path)
        try:
            self.put("trace_clock", "mono")
            self.put("buffer_size_kb", "8192")
            for point in points:
                self.put(f"events/{point}/enable", "1")
        except BaseException:  # Ctrl-C, too
            self.close()
            raise

    def put(self, name, text):
        with open(f"{self.path}/{name}", "w") as file:
            file.write(text)

    def take(self):
        """Return {(our port, the peer's): [(time, word), ...]}, and forget.

        A time is one of time.monotonic().  A word is a state ("CLOSE_WAIT"),
        "RST" for one that came, "error 110", "again" for a retransmission, or
        "5 bytes" for data that came.
        """
        facts = collections.defaultdict(list)
        with open(f"{self.path}/trace") as file:
            text = file.read()
        self.put("trace", "")
        for when, record in re.findall(r"(\d+\.\d+): (\w+: .*)", text):
            ports = re.search(r" (?:sport=|src=\S+:)(\d+)"
                              r" (?:dport=|dest=\S+:)(\d+)", record)
            for pattern, word in WORDS if ports else ():
                found = re.search(pattern, record)
                if found:
                    facts[int(ports[1]), int(ports[2])].append(
                        (float(when), found.expand(word)))
                    break
        return facts

    def close(self):
        os.rmdir(self.path)
