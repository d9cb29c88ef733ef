// Tokens as bytes and as text a person can read.

const encoder = new TextEncoder();

/** Bytes of a logprobs label: the token's text, or "bytes:\xe2\x80" where it is no whole character. */
export function bytesOfLabel(label) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(label)) return encoder.encode(label);
  return Uint8Array.from(label.matchAll(/\\x(..)/g), ([, hex]) => parseInt(hex, 16));
}

const printable = (byte) => (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;

/** Byte-level BPE writes a byte as a character: itself if that is printable, else the next free one from 256. */
const byteOf = new Map();
for (let byte = 0, next = 256; byte < 256; byte++) byteOf.set(printable(byte) ? byte : next++, byte);

/** Bytes of a tokenizer's own name of a token ("Ġthe" is " the"). Special tokens are plain text. */
export function bytesOfName(name) {
  const codes = Array.from(name, (character) => byteOf.get(character.codePointAt(0)));
  return codes.includes(undefined) ? encoder.encode(name) : Uint8Array.from(codes);
}

/** The label that the same bytes have in logprobs. */
export function labelOf(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return "bytes:" + Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  }
}

/** A label with its white space made visible. */
export function visible(label) {
  if (label === "") return "(empty)";
  return label.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

export const count = (value) => Math.round(value).toLocaleString("en");

/** The digits that matter: 0.042, 4.2, 42, 1,234. */
export function short(value) {
  const size = Math.abs(value);
  if (size >= 100 || Number.isInteger(value)) return count(value);
  return value.toFixed(size >= 10 ? 0 : size >= 1 ? 1 : size >= 0.1 ? 2 : 3);
}

export const percent = (share) => (share >= 0.9995 ? "100" : (share * 100).toFixed(share >= 0.1 ? 1 : 2)) + "%";

export function bytes(value) {
  let unit = 0;
  for (; value >= 1024 && unit < 4; unit++) value /= 1024;
  return `${value.toFixed(value < 10 && unit ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

/** An element with properties and children; text never becomes markup. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
