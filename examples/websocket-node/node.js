// A node of a Cortex network: softmax regression on a CSV file of its own, the label first in each line.
// node node.js ws://HOST:8765 TOKEN NAME REGION DATASET FILE.csv
import crypto from "node:crypto";
import fs from "node:fs";
import WebSocket from "ws";
import { SealingKey, chunkFrame, headerFrame, objectKey, readFrame, signer, trailerFrame } from "./wire.js";

const [url, token, node, region, dataset, file] = process.argv.slice(2);
const usage = "usage: node node.js ws://HOST:8765 TOKEN NAME REGION DATASET FILE.csv; TOKEN begins with ctxnode_";
if (!file || !token.startsWith("ctxnode_")) process.exit(console.error(usage) ?? 2);
const rows = fs.readFileSync(file, "utf8").trim().split("\n").map((line) => line.split(",").map(Number));
const [, token_id, secret] = token.split("_"), sign = signer(secret), sealing = new SealingKey();
const hello = { node, region, incarnation: crypto.randomUUID() }, sealing_key = sealing.public.toString("hex");
const socket = new WebSocket(url, { perMessageDeflate: false }), answers = new Map();
let lastId = 0, network = "", working = "", takeFrame = () => {};

function send(type, body) {
  socket.send(JSON.stringify({ type, id: ++lastId, ...body }));
  return new Promise((resolve, reject) => answers.set(lastId, { resolve, reject }));
}

const handlers = { // what comes unasked
  CHALLENGE({ versions, network: ours, challenge }) {
    network = ours;
    const proof = sign("cortex.v1 join", network, node, sealing_key, challenge);
    send("JOIN", { version: versions[0], hello, token_id, sealing_key, challenge, proof }).then(() => working || beat());
  },
  ASSIGNMENTS: ({ assignments }) => assignments.forEach(carryOut),
  ERROR: ({ message }) => console.error(message), // the gateway closes next
};

async function beat() { // keeps the node's lease, and says what it has
  const [cpu_cores, memory_bytes, slots] = [1, 1 << 30, 1], none = { cpu_utilisation: 0, disk_free_bytes: 0 };
  const resources = { ...none, cpu_cores, memory_bytes, memory_available_bytes: memory_bytes, network_sent_bytes: 0,
    network_received_bytes: 0, slots, free_slots: slots };
  const classes = Math.max(...rows.map(([label]) => label)) + 1, input_shape = [rows[0].length - 1];
  const datasets = [{ name: dataset, input_shape, classes, examples: rows.length }];
  const { heartbeat_s } = await send("HEARTBEAT", { resources, datasets, activity: working ||= "ready" });
  setTimeout(beat, heartbeat_s * 1000);
}

async function carryOut(work) { // the same assignment comes again: it is done once
  if (working === work.assignment_id || work.work.kind === "hold") return;
  working = work.assignment_id;
  const { assignment_id, job_id, round, seat } = work, place = { assignment_id, job_id, round, seat };
  const failed = (reason) => ({ kind: "failed", reason: String(reason), is_permanent: false });
  const act = { initialise, train }[work.work.kind] ?? (() => Promise.reject(`this node does not ${work.work.kind}`));
  const outcome = await act(work, sealing.unwrap(network, job_id, work.data_key)).catch(failed);
  const { wanted } = await send("WORK_RESULT", { place, outcome });
  console.log(JSON.stringify({ round, kind: outcome.kind, reason: outcome.reason, wanted, ...outcome.metrics }));
}

async function initialise(work, key) { // all zeros will do: the loss is convex
  const { input_dim, output_dim } = work.spec.model, weights = output_dim * input_dim;
  const tensor = (name, offset, shape) => ({ dtype: "F32", kind: "trainable", name, offset, shape });
  const tensors = [tensor("output.weight", 0, [output_dim, input_dim]), tensor("output.bias", weights, [output_dim])];
  const manifest = Buffer.from(JSON.stringify({ tensors })), digest = crypto.createHash("sha256").update(manifest);
  return push(work, key, new Float32Array(weights + output_dim), { manifest, manifest_sha256: digest.digest("hex") }, 1);
}

async function train(work, key) {
  const { values, manifest_sha256 } = await pull(work), local = values.slice();
  const { learning_rate, local_epochs } = work.spec.training, { output_dim, input_dim } = work.spec.model;
  const mine = rows.filter((_, i) => i % work.seats === work.seat), steps = mine.length * (local_epochs ?? 1);
  let loss = 0;
  for (let step = 0; step < steps; step++) { // one example at a time
    const [label, ...x] = mine[step % mine.length], bias = output_dim * input_dim;
    const dot = (c) => x.reduce((sum, each, i) => sum + each * local[c * input_dim + i], local[bias + c]);
    const logits = Array.from({ length: output_dim }, (_, c) => dot(c)), top = Math.max(...logits);
    const scale = logits.reduce((sum, each) => sum + Math.exp(each - top), 0);
    loss += Math.log(scale) + top - logits[label];
    logits.forEach((each, c) => {
      const change = learning_rate * (Math.exp(each - top) / scale - (c === label));
      x.forEach((value, i) => { local[c * input_dim + i] -= change * value; });
      local[bias + c] -= change;
    });
  }
  const told = { steps, examples: steps, metrics: { train_loss: loss / steps }, bytes_down: 4 * values.length };
  return { ...await push(work, key, local.map((v, i) => v - values[i]), { manifest_sha256 }, mine.length), ...told };
}

async function pull({ job_id, base_sha256, round, data_key, older_keys }) { // header, chunks in order, trailer
  const frames = [], whole = new Promise((done) => { takeFrame = (frame) => frame ? frames.push(frame) : done(); });
  await Promise.race([whole, send("MODEL_PULL", { job_id, sha256: base_sha256, round })]); // or it is refused
  const [header, ...chunks] = frames, key = [data_key, ...older_keys].find(({ key_id }) => key_id === header.key_id);
  const { open } = objectKey(sealing.unwrap(network, job_id, key), header);
  const plain = chunks.map(({ index, sealed }) => open(index, sealed).subarray(0, -1)); // less the tag byte
  return { ...header, values: new Float32Array(new Uint8Array(Buffer.concat(plain)).buffer) };
}

async function push(work, dataKey, delta, like, weight) {
  const { transfer_id: job_id, round, attempt, fence, seat, base_sha256, chunk_elements } = work, elements = delta.length;
  const [object_id, salt] = [crypto.randomBytes(16), crypto.randomBytes(32)], manifest = Buffer.alloc(0);
  const header = { kind: 1, object_id, salt, network, job_id, round, attempt, fence, sender: node, seat, weight, manifest,
    key_id: work.data_key.key_id, codec: "none", codec_options: "{}", chunk_elements, elements, counters: 0, base_sha256,
    model_sha256: "", first_chunk: 0, chunks: Math.ceil(elements / chunk_elements), ...like };
  const { seal } = objectKey(dataKey, header), bytes = Buffer.from(delta.buffer), size = 4 * chunk_elements;
  const part = (i) => Buffer.concat([bytes.subarray(i * size, (i + 1) * size), Buffer.from([0])]); // 0: not packed
  const sealed = Array.from({ length: header.chunks }, (_, i) => seal(i, part(i))), begun = Date.now();
  const accepted = send("WEIGHTS_UPDATE");
  [headerFrame(header), ...sealed.map((each, i) => chunkFrame(i, each)), trailerFrame(sealed)]
    .forEach((frame) => socket.send(frame)); // so small an update fits the window: nothing to wait for
  const { receipt } = await accepted, bytes_up = sealed.reduce((sum, each) => sum + each.length, 0);
  return { kind: "trained", receipt, train_seconds: 0, exchange_seconds: (Date.now() - begun) / 1000, examples: 0,
    steps: 0, metrics: {}, bytes_up, bytes_down: 0 };
}

socket.on("message", (data, isBinary) => {
  if (isBinary) return takeFrame(readFrame(data));
  const message = JSON.parse(data), waiting = answers.get(message.ref), { type } = message;
  if (!waiting) return handlers[type]?.(message);
  return type === "ERROR" ? waiting.reject(message.message) : /ACK$|RESUME/.test(type) && /^WEIGHTS/.test(type) ||
    waiting.resolve(message);
});
socket.on("close", (code, reason) => process.exit(console.error(`closed: ${code} ${reason}`) ?? (code === 1000 ? 0 : 1)));
socket.on("error", (error) => console.error(error.message));
process.on("SIGTERM", () => send("LEAVE"));
