// A model that was exported with `scripts/export.py --format onnx`, telling stories in this browser.
// The import map of index.html says where the two libraries come from.

export const GRAPHS = { int8: "onnx/model_quantized.onnx", float32: "onnx/model.onnx" };

// What went wrong, in words for the visitor.
export class StoryError extends Error {}

const SETTINGS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];

export class Storyteller {
  // `onProgress(bytes so far, bytes expected)` is called while files arrive.
  static async load(precision, onProgress) {
    const progress = new Progress(onProgress);
    const [{ ort, Tokenizer }, graph, config, generation, tokenizer, tokenizerConfig] = await Promise.all([
      once("libraries", () => loadLibraries(progress)),
      download(GRAPHS[precision], progress),
      ...SETTINGS.map((file) => once(file, () => download(file, progress).then(parse))),
    ]);
    try {
      const session = await ort.InferenceSession.create(graph);
      return new Storyteller(ort, session, config, generation, new Tokenizer(tokenizer, tokenizerConfig));
    } catch (error) {
      throw new StoryError(`This browser could not start the model (${error.message ?? error}).`);
    }
  }

  constructor(ort, session, config, generation, tokenizer) {
    Object.assign(this, { ort, session, tokenizer });
    this.start = generation.bos_token_id ?? generation.eos_token_id;
    this.ends = [generation.eos_token_id].flat();
    this.context = config.max_position_embeddings ?? config.n_positions;
    this.layers = config.num_hidden_layers ?? config.n_layer;
    this.heads = config.num_key_value_heads ?? config.num_attention_heads ?? config.n_head;
    this.headSize = config.head_dim ?? (config.hidden_size ?? config.n_embd) / (config.num_attention_heads ?? config.n_head);
  }

  // Calls `onText(story so far)` for each token. Ends at the model's end token, at its context, or at `signal`.
  async tell(prompt, { temperature, topK, topP, seed }, onText, signal) {
    const promptIds = this.tokenizer.encode(prompt).ids;
    // Training stories follow an end token, so every story begins after one.
    const ids = promptIds[0] === this.start ? promptIds : [this.start, ...promptIds];
    if (ids.length >= this.context) {
      throw new StoryError(`That beginning has ${ids.length} tokens, and the model's memory ${this.context}: shorten it.`);
    }
    const random = randomNumbers(seed);
    const begun = performance.now();
    let fresh = ids.slice();
    let cache = this.emptyCache();
    let painted = begun;
    let tokens = 0;
    let end = "context";
    while (ids.length < this.context) {
      if (signal?.aborted) {
        end = "stopped";
        break;
      }
      const { logits, ...present } = await this.session.run({ ...this.inputs(fresh, ids.length), ...cache });
      const last = logits.data.subarray(logits.data.length - logits.dims[2]);
      const next = draw(last, { temperature, topK, topP }, random);
      tokens += 1;
      if (this.ends.includes(next)) {
        end = "end";
        break;
      }
      ids.push(next);
      fresh = [next];
      cache = Object.fromEntries(
        Object.entries(present).map(([name, tensor]) => [name.replace("present", "past_key_values"), tensor]),
      );
      onText(this.text(ids));
      if (performance.now() - painted > 30) {
        await new Promise((resolve) => setTimeout(resolve)); // lets the page paint and hear its buttons
        painted = performance.now();
      }
    }
    return { text: this.text(ids), ids, tokens, end, seconds: (performance.now() - begun) / 1000 };
  }

  text(ids) {
    // A character of several tokens is no character before its last one.
    return this.tokenizer.decode(ids, { skip_special_tokens: true }).replace(/\uFFFD+$/, "");
  }

  inputs(fresh, total) {
    const tensor = (values) => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    return {
      input_ids: tensor(fresh),
      attention_mask: tensor(new Array(total).fill(1)),
      position_ids: tensor(fresh.map((_, i) => total - fresh.length + i)),
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

// The likeliest token at temperature 0; else one drawn after temperature, top-k and top-p, in the order of
// transformers' generate(). topK 0 and topP 1 cut nothing off.
export function draw(logits, { temperature, topK, topP }, random) {
  if (temperature === 0) {
    return logits.reduce((best, logit, i) => (logit > logits[best] ? i : best), 0);
  }
  const least = topK > 0 && topK < logits.length ? Float32Array.from(logits).sort().at(-topK) : -Infinity;
  const candidates = [];
  logits.forEach((logit, id) => logit >= least && candidates.push([logit, id]));
  candidates.sort((a, b) => b[0] - a[0]);
  let weights = candidates.map(([logit]) => Math.exp((logit - candidates[0][0]) / temperature));
  const all = weights.reduce((sum, weight) => sum + weight, 0);
  if (topP < 1) {
    let before = 0; // a token stays where those likelier than it do not reach topP together
    weights = weights.filter((weight) => {
      const stays = before < topP * all;
      before += weight;
      return stays;
    });
  }
  let left = random() * weights.reduce((sum, weight) => sum + weight, 0);
  const drawn = weights.findIndex((weight) => (left -= weight) < 0);
  return candidates[drawn < 0 ? 0 : drawn][1];
}

// Numbers in [0, 1), the same for the same seed (mulberry32 by Tommy Ettinger, public domain).
export function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 4294967296;
  };
}

// Both graphs share all else: it is loaded with the first of them. A failure is not kept, so that the next
// press of the button tries again.
const loaded = {};
function once(name, load) {
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
    ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
    return { ort, Tokenizer };
  } catch (error) {
    if (error instanceof StoryError) throw error;
    throw new StoryError("The page's libraries could not be loaded. Is there a connection, and does nothing block it?");
  }
}

function parse(bytes) {
  return JSON.parse(new TextDecoder().decode(bytes));
}

async function download(file, progress) {
  let response;
  try {
    response = await fetch(file);
  } catch {
    throw new StoryError(`${file} could not be loaded. Is there a connection?`);
  }
  if (!response.ok) throw new StoryError(`${file} is not there (the server answers ${response.status}).`);
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
    throw new StoryError(`The connection broke while ${file} was loading. Try again.`);
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
    this.onProgress?.(this.received, Math.max(this.expected, this.received)); // a compressed file grows
  }
}
