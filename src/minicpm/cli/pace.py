"""How fast the replies of a conversation came."""

from __future__ import annotations

from minicpm.cli.reply import Reply


class Pace:
    """Sums over the replies of a conversation."""

    def __init__(self) -> None:
        self.num_replies = 0
        self.num_tokens = 0
        self.decode_tokens = 0
        self.decode_seconds = 0.0
        self.first_seconds = 0.0

    def add(self, reply: Reply, num_tokens: int) -> str:
        """Count a reply of `num_tokens` tokens and return the line about it."""
        decode_seconds = reply.seconds - reply.first_seconds
        self.num_replies += 1
        self.num_tokens += num_tokens
        self.decode_tokens += max(num_tokens - 1, 0)
        self.decode_seconds += decode_seconds
        self.first_seconds += reply.first_seconds
        line = f"{num_tokens} tokens"
        # The first token ends the prefill; the pace is that of the others.
        if num_tokens > 1 and decode_seconds > 0:
            line += f", {(num_tokens - 1) / decode_seconds:.1f} tokens/s"
        return line + f", first after {reply.first_seconds:.2f} s" + ("" if reply.is_whole else "; stopped")

    def summary(self) -> str:
        """Return the line about all of them."""
        if not self.num_replies:
            return "no reply yet"
        line = f"{self.num_replies} replies, {self.num_tokens} tokens"
        if self.decode_seconds > 0:
            line += f", {self.decode_tokens / self.decode_seconds:.1f} tokens/s"
        return line + f", first token after {self.first_seconds / self.num_replies:.2f} s on average"
