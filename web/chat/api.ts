// OpenAI's API as this server speaks it; nothing here is special to it.
export interface Token { text: string; logprob: number; top: { text: string; logprob: number }[] }
export interface Model { id: string; max_model_len?: number; meta?: Record<string, unknown> }
export interface Settings { system: string; temperature: number; topP: number; maxTokens: number; seed: string; logprobs: boolean }
export interface Turn { role: "user" | "assistant"; content: string; tokens?: Token[]; note?: string; end?: string }
export interface Delta { text: string; tokens: Token[]; end: string | null; usage: number | null }

export class Refused extends Error {
  constructor(readonly status: number, message: string) {
    super(message);
  }
}

async function ask(path: string, key: string, init: RequestInit = {}): Promise<Response> {
  const headers: Record<string, string> = key ? { authorization: `Bearer ${key}` } : {};
  if (init.body) headers["content-type"] = "application/json";
  // With a key of its own the browser must not ask for another one.
  const response = await fetch(path, { ...init, headers, credentials: key ? "omit" : "same-origin" });
  if (response.ok) return response;
  const body = (await response.json().catch(() => null)) as { error?: { message?: string } } | null;
  throw new Refused(response.status, body?.error?.message ?? `HTTP ${response.status}`);
}

export async function models(key: string): Promise<Model[]> {
  return ((await (await ask("/v1/models", key)).json()) as { data: Model[] }).data;
}

export async function* complete(model: string, turns: Turn[], s: Settings, key: string, signal: AbortSignal): AsyncGenerator<Delta> {
  const messages: { role: string; content: string }[] = turns.map(({ role, content }) => ({ role, content }));
  if (s.system.trim()) messages.unshift({ role: "system", content: s.system });
  const body = {
    model, messages, stream: true, stream_options: { include_usage: true },
    temperature: s.temperature, top_p: s.topP, max_tokens: s.maxTokens,
    ...(s.seed.trim() ? { seed: Number(s.seed) } : {}),
    ...(s.logprobs ? { logprobs: true, top_logprobs: 5 } : {}),
  };
  const response = await ask("/v1/chat/completions", key, { method: "POST", body: JSON.stringify(body), signal });
  for await (const text of events(response)) {
    if (text === "[DONE]") return;
    const chunk = JSON.parse(text);
    if (chunk.error) throw new Refused(500, String(chunk.error.message));
    const choice = chunk.choices?.[0];
    yield {
      text: choice?.delta?.content ?? "",
      tokens: (choice?.logprobs?.content ?? []).map(token),
      end: choice?.finish_reason ?? null,
      usage: chunk.usage?.completion_tokens ?? null,
    };
  }
}

function token(item: { token: string; logprob: number; top_logprobs?: { token: string; logprob: number }[] }): Token {
  return { text: item.token, logprob: item.logprob, top: (item.top_logprobs ?? []).map((t) => ({ text: t.token, logprob: t.logprob })) };
}

// The data of each server-sent event; an event ends with an empty line, wherever the network cuts.
async function* events(response: Response): AsyncGenerator<string> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop()!;
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield data.join("\n");
    }
  }
}
