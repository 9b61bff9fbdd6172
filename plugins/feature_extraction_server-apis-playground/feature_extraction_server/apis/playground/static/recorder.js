// Recording from the microphone into a WAV file: what browsers' own recorders make, the server cannot read.

export const canRecord = () => Boolean(navigator.mediaDevices?.getUserMedia && globalThis.AudioWorkletNode);

export class Recorder {
  static async start(onProgress) {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
    const context = new AudioContext();
    try {
      await context.audioWorklet.addModule(new URL("./recorder-worklet.js", import.meta.url));
    } catch (error) {
      stream.getTracks().forEach((track) => track.stop());
      await context.close();
      throw error;
    }
    return new Recorder(stream, context, onProgress);
  }

  constructor(stream, context, onProgress) {
    this.stream = stream;
    this.context = context;
    this.blocks = [];
    this.length = 0;
    const node = new AudioWorkletNode(context, "samples", { numberOfOutputs: 0 });
    node.port.onmessage = ({ data }) => {
      this.blocks.push(data);
      this.length += data.length;
      onProgress(Math.sqrt(data.reduce((sum, sample) => sum + sample * sample, 0) / data.length), this.length / context.sampleRate);
    };
    context.createMediaStreamSource(stream).connect(node);
  }

  // The recording, or null where there is none.
  async stop() {
    this.stream.getTracks().forEach((track) => track.stop());
    const rate = this.context.sampleRate;
    await this.context.close();
    return this.length ? new File([wav(this.blocks, this.length, rate)], "recording.wav", { type: "audio/wav" }) : null;
  }
}

// One channel of 16-bit samples.
function wav(blocks, length, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * length));
  const text = (offset, value) => [...value].forEach((character, i) => view.setUint8(offset + i, character.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * length, true);
  let offset = 44;
  for (const block of blocks) {
    for (const sample of block) {
      view.setInt16(offset, Math.max(-1, Math.min(1, sample)) * 0x7fff, true);
      offset += 2;
    }
  }
  return view.buffer;
}
