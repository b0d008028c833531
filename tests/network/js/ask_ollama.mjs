// Every method of npm's ollama, on the node at the URL that is given; prints what came, as JSON.
// Those that go to ollama.com whatever the host is (webSearch, webFetch) are left out.
import { Ollama } from "ollama";

const [, , host, model, tools, registry, digest] = process.argv;
const ollama = new Ollama({ host });
const options = { temperature: 0, num_predict: 6 };
const messages = [{ role: "user", content: "Say hello." }];
const said = {};

async function all(parts) {
  const found = [];
  for await (const part of parts) found.push(part);
  return found;
}

async function refused(work) {
  try {
    await work();
    return null;
  } catch (error) {
    return { status: error.status_code ?? null, message: error.message };
  }
}

said.version = (await ollama.version()).version;
said.chat = await ollama.chat({ model, messages, options });
said.chatParts = await all(await ollama.chat({ model, messages, options, stream: true }));
said.logprobs = (await ollama.chat({ model, messages, options, logprobs: true, top_logprobs: 2 })).logprobs;
said.json = (await ollama.generate({
  model, prompt: "Name a colour.", options: { temperature: 0, num_predict: 40 },
  format: { type: "string", enum: ["red", "blue"] },
})).response;
said.generate = await ollama.generate({ model, prompt: "Once upon", raw: true, options });
said.generateParts = await all(await ollama.generate({ model, prompt: "Once upon", raw: true, options, stream: true }));

const weather = (city) => ({ function: { name: "weather", arguments: { city } } });
said.tools = (await ollama.chat({
  model: tools,
  messages: ["Rome", "Paris"].flatMap((city) => [
    { role: "user", content: `Weather in ${city}?` },
    { role: "assistant", content: "", tool_calls: [weather(city)] },
    { role: "tool", content: "rain" },
  ]).concat([{ role: "user", content: "Weather in Rome?" }]),
  tools: [{ type: "function", function: { name: "weather", description: "The weather", parameters: {
    type: "object", required: ["city"], properties: { city: { type: "string", enum: ["Paris", "Rome"] } } } } }],
  options: { temperature: 0, num_predict: 60 },
})).message.tool_calls;

said.embed = (await ollama.embed({ model, input: ["one", "two"] })).embeddings.map((each) => each.length);
said.embeddings = (await ollama.embeddings({ model, prompt: "one" })).embedding.length;
said.ps = (await ollama.ps()).models.map((each) => each.model);
said.show = await ollama.show({ model });

said.create = (await all(await ollama.create({ model: "js", from: model, system: "Be brief.", stream: true }))).map((each) => each.status);
said.createFromFile = (await ollama.create({ model: "js-file", files: { "m.gguf": digest } })).status;
await ollama.copy({ source: "js", destination: `${registry}/lab/js:1` });
said.push = (await all(await ollama.push({ model: `${registry}/lab/js:1`, insecure: true, stream: true }))).map((each) => each.status);
await ollama.delete({ model: `${registry}/lab/js:1` });
said.without = (await ollama.list()).models.map((each) => each.model);
said.pull = (await all(await ollama.pull({ model: `${registry}/lab/js:1`, insecure: true, stream: true }))).map((each) => each.status);
said.with = (await ollama.list()).models.map((each) => each.model);
said.pulledSystem = (await ollama.show({ model: `${registry}/lab/js:1` })).system;
for (const name of ["js", "js-file", `${registry}/lab/js:1`]) await ollama.delete({ model: name });

const stream = await ollama.chat({ model, messages, options: { ...options, num_predict: 400 }, stream: true });
said.aborted = (await refused(async () => { for await (const _ of stream) stream.abort(); }))?.message;

said.errors = {
  chat: await refused(() => ollama.chat({ model: "none", messages })),
  chatStream: await refused(() => ollama.chat({ model: "none", messages, stream: true })),
  show: await refused(() => ollama.show({ model: "none" })),
  delete: await refused(() => ollama.delete({ model: "none" })),
  copy: await refused(() => ollama.copy({ source: "none", destination: "other" })),
  pull: await refused(() => ollama.pull({ model: `${registry}/lab/none:1`, insecure: true })),
  tools: await refused(() => ollama.chat({ model, messages, tools: [{ type: "function", function: { name: "f", parameters: {} } }] })),
  systemone: await refused(() => ollama.systemone({ model, state: "x", questions: {} })),
};
console.log(JSON.stringify(said));
