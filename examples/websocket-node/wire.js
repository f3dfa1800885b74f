// What travels: keys opened, objects sealed, weight frames in protobuf. Every step is in docs/websocket.md, section 7.
import crypto from "node:crypto";

const text = (value) => Buffer.from(value, "utf8");
const sha256 = (...parts) => crypto.createHash("sha256").update(Buffer.concat(parts)).digest();
const hmac = (key, ...parts) => crypto.createHmac("sha256", key).update(Buffer.concat(parts)).digest();
const hkdf = (key, salt, info, length) => Buffer.from(crypto.hkdfSync("sha256", key, salt, info, length));
const NONE = Buffer.alloc(0);

export function signer(secret) { // Ed25519, from the token's secret: it never travels
  const seed = hkdf(Buffer.from(secret, "hex"), "", "cortex.v1 node token", 32);
  const der = Buffer.concat([Buffer.from("302e020100300506032b657004220420", "hex"), seed]);
  const key = crypto.createPrivateKey({ key: der, format: "der", type: "pkcs8" });
  return (...lines) => crypto.sign(null, text(lines.join("\n")), key).toString("hex");
}

export class SealingKey { // X25519: what job keys come wrapped to
  private = crypto.generateKeyPairSync("x25519").privateKey;
  public = Buffer.from(this.private.export({ format: "jwk" }).x, "base64url");

  unwrap(network, jobId, { key_id, epoch, wrapped }) { // HPKE (RFC 9180), base mode
    const data = Buffer.from(wrapped, "hex"), encapsulated = data.subarray(0, 32);
    const jwk = { kty: "OKP", crv: "X25519", x: encapsulated.toString("base64url") };
    const theirs = crypto.createPublicKey({ key: jwk, format: "jwk" });
    const shared = crypto.diffieHellman({ privateKey: this.private, publicKey: theirs });
    const kem = Buffer.from("KEM\x00\x20", "latin1"), suite = Buffer.from("HPKE\x00\x20\x00\x01\x00\x02", "latin1");
    const extract = (id, salt, label, input) => hmac(salt, text("HPKE-v1"), id, text(label), input);
    const expand = (id, key, label, info, size) =>
      hmac(key, Buffer.from([0, size]), text("HPKE-v1"), id, text(label), info, Buffer.from([1])).subarray(0, size);
    const pair = Buffer.concat([encapsulated, this.public]);
    const secret = expand(kem, extract(kem, NONE, "eae_prk", shared), "shared_secret", pair, 32);
    const info = text(["cortex data key v1", network, jobId, key_id, epoch].join("\n"));
    const hashes = [extract(suite, NONE, "psk_id_hash", NONE), extract(suite, NONE, "info_hash", info)];
    const key = extract(suite, secret, "secret", NONE), context = Buffer.concat([Buffer.from([0]), ...hashes]);
    const nonce = expand(suite, key, "base_nonce", context, 12);
    return open(expand(suite, key, "key", context, 32), nonce, data.subarray(32));
  }
}

function open(key, nonce, sealed) {
  const cipher = crypto.createDecipheriv("aes-256-gcm", key, nonce).setAuthTag(sealed.subarray(-16));
  return Buffer.concat([cipher.update(sealed.subarray(0, -16)), cipher.final()]);
}

function hexFloat(value) { // as C's %a prints it, with all its digits: 0x1.8000000000000p+1
  const exponent = Math.floor(Math.log2(value)), mantissa = (value / 2 ** exponent - 1) * 2 ** 52;
  return value ? `0x1.${mantissa.toString(16).padStart(13, "0")}p${exponent < 0 ? "" : "+"}${exponent}` : "0x0.0p+0";
}

export function objectKey(dataKey, header) { // derived from the job's key and the header: for this one object
  const { model_sha256, first_chunk, ...facts } = header;
  Object.assign(facts, { kind: ["", "update", "model", "delta"][header.kind], weight: hexFloat(header.weight) });
  for (const name of ["object_id", "salt"]) facts[name] = header[name].toString("hex");
  facts.manifest = header.manifest.length ? sha256(header.manifest).toString("hex") : "";
  const canonical = text(JSON.stringify(facts, Object.keys(facts).sort()));
  const derived = hkdf(dataKey, header.salt, sha256(canonical), 39), key = derived.subarray(0, 32);
  const nonce = (index) => { // seven bytes, the index in four, and one that says whether it is the last chunk
    const counter = Buffer.from([0, 0, 0, 0, index === header.chunks - 1 ? 1 : 0]);
    counter.writeUInt32BE(index);
    return Buffer.concat([derived.subarray(32), counter]);
  };
  const seal = (index, plain) => {
    const cipher = crypto.createCipheriv("aes-256-gcm", key, nonce(index));
    return Buffer.concat([cipher.update(plain), cipher.final(), cipher.getAuthTag()]);
  };
  return { seal, open: (index, sealed) => open(key, nonce(index), sealed) };
}

// TransferHeader, in the order of its field numbers: whole numbers (+), bytes (*), one double (#), texts.
const FIELDS = [..."+kind *object_id *salt network job_id +round +attempt +fence sender +seat key_id codec "
  .concat("codec_options +chunk_elements +elements +counters +chunks manifest_sha256 base_sha256 model_sha256 ")
  .concat("*manifest #weight +first_chunk").matchAll(/(\W?)(\w+) ?/g)].map(([, kind, name]) => [kind.trim(), name]);

function varint(value, low = []) {
  for (; value > 127; value = Math.floor(value / 128)) low.push((value % 128) | 128);
  return Buffer.from([...low, value]);
}

function field(number, value, kind = "") {
  if (!value || value.length === 0) return NONE;
  if (kind === "+") return Buffer.concat([varint(number * 8), varint(value)]);
  if (kind === "#") return Buffer.concat([varint(number * 8 + 1), Buffer.from(new Float64Array([value]).buffer)]);
  const data = Buffer.from(value);
  return Buffer.concat([varint(number * 8 + 2), varint(data.length), data]);
}

function fields(data) {
  const found = {}; let at = 0;
  const next = (value = 0, scale = 1) => {
    const byte = data[at++];
    return byte < 128 ? value + byte * scale : next(value + (byte - 128) * scale, scale * 128);
  };
  const slice = (size) => data.subarray(at, (at += size));
  const readers = [next, () => slice(8).readDoubleLE(), () => slice(next())];
  for (let tag; at < data.length; found[Math.floor(tag / 8)] = readers[tag % 8]()) tag = next();
  return found;
}

export function readFrame(message) { // a frame is field 1; in it header, chunk or trailer are fields 1, 2, 3
  const frame = fields(fields(message)[1]), chunk = frame[2] && fields(frame[2]), raw = frame[1] && fields(frame[1]);
  if (!raw) return chunk ? { index: chunk[1] ?? 0, sealed: chunk[2] } : null;
  const read = { "+": (value = 0) => value, "#": (value = 0) => value, "*": (value = NONE) => value, "": String };
  return Object.fromEntries(FIELDS.map(([kind, name], i) => [name, read[kind](raw[i + 1] ?? (kind ? undefined : ""))]));
}

export const headerFrame = (header) =>
  field(1, field(1, Buffer.concat(FIELDS.map(([kind, name], i) => field(i + 1, header[name], kind)))));
export const chunkFrame = (index, sealed) => field(1, field(2, Buffer.concat([field(1, index, "+"), field(2, sealed)])));
export const trailerFrame = (sealed) => field(1, field(3, Buffer.concat(
  [field(1, sealed.length, "+"), field(2, sha256(...sealed.map((each) => each.subarray(-16))))])));
