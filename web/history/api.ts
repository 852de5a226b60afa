export interface Row { step: number; tokens: number; stage: string; lr: number; losses: Record<string, number>; num_bytes: number; is_key: boolean }
export interface Branch { name: string; parent: string | null; begin: number | null; first: number | null; last: number | null; stage: string | null; loss: number | null }
// Points are [step, value, standard error].
export interface Series { label: string; points: [number, number, number | null][] }
export interface Run {
  name: string; num_parameters: number; num_layers: number; code_version: string; checkpoints: Row[];
  train: [number, number, number | null, string | null][]; heldout: [number, number][]; scores: Series[]; branches: Branch[]; can_generate: boolean;
}
export interface Layer { name: string; norm: number | null; change: number | null; cosine: number | null }
export interface Layers { step: number; previous: number | null; layers: Layer[] }
export interface Samples { step: number | null; samples: { prompt: string; text: string }[] }
export interface Manifest {
  step: number; tokens: number; stage: string; lr: number; batch_sequences: number; seed: number; parent: string | null; manifest_sha256: string; bytes: number;
  losses: Record<string, number>; tensors: { name: string; type: string; shape: number[]; sha256: string }[];
}

export async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  const response = await fetch(path, { signal });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error ?? `HTTP ${response.status}`);
  return body as T;
}
