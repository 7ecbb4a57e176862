// Generates text in this browser with a model that `scripts/export.py --format onnx` exported.
// The import map of index.html contains the addresses of the two libraries.

export const GRAPHS = { int8: "onnx/model_quantized.onnx", float32: "onnx/model.onnx" };

// An error whose message is shown to the visitor.
export class StoryError extends Error {}

const CONFIG_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];

export class StoryGenerator {
  // Calls `onProgress(received bytes, expected bytes)` during the download.
  static async load(precision, onProgress) {
    const progress = new Progress(onProgress);
    const [{ ort, Tokenizer }, graph, config, generation, tokenizer, tokenizerConfig] = await Promise.all([
      loadOnce("libraries", () => loadLibraries(progress)),
      download(GRAPHS[precision], progress),
      ...CONFIG_FILES.map((file) => loadOnce(file, () => download(file, progress).then(parse))),
    ]);
    try {
      const session = await ort.InferenceSession.create(graph);
      return new StoryGenerator(ort, session, config, generation, new Tokenizer(tokenizer, tokenizerConfig));
    } catch (error) {
      throw new StoryError(`This browser could not start the model (${error.message ?? error}).`);
    }
  }

  constructor(ort, session, config, generation, tokenizer) {
    Object.assign(this, { ort, session, tokenizer });
    this.bosTokenId = generation.bos_token_id ?? generation.eos_token_id;
    this.stopTokenIds = [generation.eos_token_id].flat();
    this.suppressedIds = generation.suppress_tokens ?? [];
    this.context = config.max_position_embeddings ?? config.n_positions;
    this.layers = config.num_hidden_layers ?? config.n_layer;
    this.heads = config.num_key_value_heads ?? config.num_attention_heads ?? config.n_head;
    this.headSize = config.head_dim ?? (config.hidden_size ?? config.n_embd) / (config.num_attention_heads ?? config.n_head);
  }

  // Calls `onText(text so far)` after each token. Stops at a stop token, at the end of the context, or when
  // `signal` is aborted; `finishReason` of the result is then "stop", "length" or "aborted".
  async generate(prompt, { temperature, topK, topP, seed }, onText, signal) {
    // In training an end token precedes each story, so the prompt starts with one, and not with two.
    const promptIds = this.tokenizer.encode(prompt, { add_special_tokens: false }).ids;
    const ids = promptIds[0] === this.bosTokenId ? promptIds : [this.bosTokenId, ...promptIds];
    if (ids.length >= this.context) {
      throw new StoryError(`The prompt has ${ids.length} tokens, but the model's context is ${this.context}. Shorten the prompt.`);
    }
    const random = randomNumbers(seed);
    const startedAt = performance.now();
    let newIds = ids.slice();
    let cache = this.emptyCache();
    let lastPaint = startedAt;
    let tokens = 0;
    let finishReason = "length";
    while (ids.length < this.context) {
      if (signal?.aborted) {
        finishReason = "aborted";
        break;
      }
      const { logits, ...present } = await this.session.run({ ...this.inputs(newIds, ids.length), ...cache });
      const last = logits.data.subarray(logits.data.length - logits.dims[2]);
      for (const id of this.suppressedIds) last[id] = -Infinity;
      const next = sampleToken(last, { temperature, topK, topP }, random);
      tokens += 1;
      if (this.stopTokenIds.includes(next)) {
        finishReason = "stop";
        break;
      }
      ids.push(next);
      newIds = [next];
      cache = Object.fromEntries(
        Object.entries(present).map(([name, tensor]) => [name.replace("present", "past_key_values"), tensor]),
      );
      onText(this.text(ids));
      if (performance.now() - lastPaint > 30) {
        await new Promise((resolve) => setTimeout(resolve)); // lets the browser repaint and handle clicks
        lastPaint = performance.now();
      }
    }
    return { text: this.text(ids), ids, tokens, finishReason, seconds: (performance.now() - startedAt) / 1000 };
  }

  text(ids) {
    // A character of several tokens is incomplete (U+FFFD) until its last token.
    return this.tokenizer.decode(ids, { skip_special_tokens: true }).replace(/\uFFFD+$/, "");
  }

  inputs(newIds, total) {
    const tensor = (values) => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    return {
      input_ids: tensor(newIds),
      attention_mask: tensor(new Array(total).fill(1)),
      position_ids: tensor(newIds.map((_, i) => total - newIds.length + i)),
    };
  }

  emptyCache() {
    const cache = {};
    for (let layer = 0; layer < this.layers; layer++) {
      for (const part of ["key", "value"]) {
        cache[`past_key_values.${layer}.${part}`] = new this.ort.Tensor(
          "float32", new Float32Array(0), [1, this.heads, 0, this.headSize],
        );
      }
    }
    return cache;
  }
}

// Returns the argmax at temperature 0, else a sample after temperature, top-k and top-p, applied in the order of
// transformers' generate(). topK 0 and topP 1 keep all tokens.
export function sampleToken(logits, { temperature, topK, topP }, random) {
  if (temperature === 0) {
    return logits.reduce((best, logit, i) => (logit > logits[best] ? i : best), 0);
  }
  const threshold = topK > 0 && topK < logits.length ? Float32Array.from(logits).sort().at(-topK) : -Infinity;
  const candidates = [];
  logits.forEach((logit, id) => logit >= threshold && candidates.push([logit, id]));
  candidates.sort((a, b) => b[0] - a[0]);
  let weights = candidates.map(([logit]) => Math.exp((logit - candidates[0][0]) / temperature));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  if (topP < 1) {
    let before = 0; // keep a token if the more likely ones together have less than topP
    weights = weights.filter((weight) => {
      const keep = before < topP * total;
      before += weight;
      return keep;
    });
  }
  let remaining = random() * weights.reduce((sum, weight) => sum + weight, 0);
  const index = weights.findIndex((weight) => (remaining -= weight) < 0);
  return candidates[index < 0 ? 0 : index][1];
}

// Returns a generator of numbers in [0, 1) for a seed (mulberry32 by Tommy Ettinger, public domain).
export function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 4294967296;
  };
}

// Both graphs share the other files, which are loaded once. A failed load is removed, so that the next click
// tries again.
const loaded = {};
function loadOnce(name, load) {
  loaded[name] ??= load().catch((error) => {
    delete loaded[name];
    throw error;
  });
  return loaded[name];
}

async function loadLibraries(progress) {
  try {
    const [ort, { Tokenizer }, wasm] = await Promise.all([
      import("onnxruntime-web/wasm"),
      import("@huggingface/tokenizers"),
      download(import.meta.resolve("onnxruntime-web/binary"), progress),
    ]);
    ort.env.wasm.wasmBinary = wasm;
    ort.env.wasm.numThreads = 1; // more threads need headers that a plain file server does not send
    return { ort, Tokenizer };
  } catch (error) {
    if (error instanceof StoryError) throw error;
    throw new StoryError("The libraries of the page could not be loaded. Check the connection and any content blocker.");
  }
}

function parse(bytes) {
  return JSON.parse(new TextDecoder().decode(bytes));
}

async function download(file, progress) {
  let response;
  try {
    // Always ask the server: after another export, a cached file would belong to an earlier model.
    response = await fetch(file, { cache: "no-cache" });
  } catch {
    throw new StoryError(`${file} could not be loaded. Check the connection.`);
  }
  if (!response.ok) throw new StoryError(`${file} could not be loaded (HTTP status ${response.status}).`);
  progress.expect(Number(response.headers.get("Content-Length")));
  const chunks = [];
  try {
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      chunks.push(value);
      progress.receive(value.length);
    }
  } catch {
    throw new StoryError(`The connection was lost while ${file} was loading. Try again.`);
  }
  return new Uint8Array(await new Blob(chunks).arrayBuffer());
}

class Progress {
  constructor(onProgress) {
    Object.assign(this, { onProgress, received: 0, expected: 0 });
  }
  expect(bytes) {
    this.expected += bytes;
  }
  receive(bytes) {
    this.received += bytes;
    this.onProgress?.(this.received, Math.max(this.expected, this.received)); // a compressed file is larger after decoding
  }
}
