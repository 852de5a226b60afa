// The reply token by token, shaded by how likely each was; one of them is looked at closely.
import { useState } from "preact/hooks";
import type { Token } from "./api";
import type { Words } from "./words";

const percent = (logprob: number) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
const shown = (text: string) => JSON.stringify(text).slice(1, -1);
const shade = (logprob: number) => `p${Math.min(4, Math.floor(5 * Math.exp(logprob)))}`;

export function Tokens({ tokens, w }: { tokens: Token[]; w: Words }) {
  const [at, setAt] = useState(-1);
  const chosen = tokens[at];
  const move = (event: KeyboardEvent) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    setAt(Math.max(0, Math.min(tokens.length - 1, at + step)));
  };
  return (
    <div class="token-view">
      <div class="tokens" role="group" tabIndex={0} aria-label={w.tokenHint} onKeyDown={move}>
        {tokens.map((token, index) => (
          <span class={`token ${shade(token.logprob)}${index === at ? " chosen" : ""}`} onMouseEnter={() => setAt(index)}>{token.text}</span>
        ))}
      </div>
      <div class="soft token-detail" role="status">
        {chosen ? (
          <>
            <code>{shown(chosen.text)}</code> {percent(chosen.logprob)}
            {chosen.top.length > 0 && <> · {w.otherwise}: {chosen.top.map((t) => <span class="option"><code>{shown(t.text)}</code> {percent(t.logprob)}</span>)}</>}
          </>
        ) : w.tokenHint}
      </div>
    </div>
  );
}
