// The JavaScript clients of scripts/dev/client_matrix.py, which copies this file next to their packages.
//
//     node runs.mjs ADDRESS MODEL JOBS
//
// JOBS is a list of [client, form, number of runs, runs at a time]. Prints one line of JSON a run.
import Anthropic from "@anthropic-ai/sdk";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { ChatOpenAI } from "@langchain/openai";
import { generateObject, generateText, jsonSchema, stepCountIs, streamObject, streamText, tool } from "ai";
import OpenAI from "openai";

const [ADDRESS, MODEL, JOBS] = process.argv.slice(2);
const QUESTION = "What is a rolling cache?";
const QUESTION_FOR_TOOL = "How many miles are 42 kilometers?";
const CUT = 200; // tokens of a JSON answer
const PERSON = {
  type: "object",
  properties: {
    name: { type: "string", maxLength: 16 },
    age: { type: "integer", minimum: 0, maximum: 130 },
    job: { type: "string", enum: ["baker", "doctor", "pilot", "teacher"] },
    hobbies: { type: "array", items: { type: "string", enum: ["chess", "hiking", "music"] }, maxItems: 3 },
  },
  required: ["name", "age", "job", "hobbies"],
  additionalProperties: false,
};
const PARAMETERS = {
  type: "object",
  properties: { kilometers: { type: "number", description: "The length in kilometers." } },
  required: ["kilometers"],
};
const FUNCTION = {
  name: "miles",
  description: "Convert a length from kilometers to miles.",
  parameters: PARAMETERS,
};
const TOOLS = [{ type: "function", function: FUNCTION }];

const miles = ({ kilometers }) => Math.round((kilometers / 1.609344) * 1000) / 1000;
const openai = () => new OpenAI({ baseURL: `${ADDRESS}/v1`, apiKey: "x", maxRetries: 0 });
const isTool = (form) => form.startsWith("tool");
const isStreamed = (form) => form.endsWith("streamed");
const question = (form) => (isTool(form) ? QUESTION_FOR_TOOL : QUESTION);
const invent = (n) => `Invent person number ${n}.`;

// A conversation in OpenAI's messages; `ask` returns the answer to them as a message.
async function converse(ask, form) {
  const messages = [{ role: "user", content: question(form) }];
  const calls = [];
  for (let turn = 0; turn < 3; turn++) {
    const message = await ask(messages, isTool(form) ? { tools: TOOLS } : {});
    if (!message.tool_calls?.length) return { text: message.content, calls };
    messages.push(message);
    for (const call of message.tool_calls) {
      const args = JSON.parse(call.function.arguments);
      calls.push([call.function.name, args]);
      messages.push({ role: "tool", tool_call_id: call.id, content: String(miles(args)) });
    }
  }
  throw new Error("the model calls the tool again and again");
}

// The message that OpenAI's chunks make up, put together as naive programs do.
async function collected(chunks) {
  let text = "", usage, finish;
  const calls = [];
  for await (const chunk of chunks) {
    usage = chunk.usage ?? usage;
    for (const { delta, finish_reason } of chunk.choices) {
      finish = finish_reason ?? finish;
      text += delta.content ?? "";
      for (const part of delta.tool_calls ?? []) {
        const call = (calls[part.index] ??= { id: part.id, type: "function", function: { name: "", arguments: "" } });
        call.function.name += part.function?.name ?? "";
        call.function.arguments += part.function?.arguments ?? "";
      }
    }
  }
  if (!usage || finish !== (calls.length ? "tool_calls" : "stop")) throw new Error(`usage ${usage}, finish ${finish}`);
  return { role: "assistant", content: text, ...(calls.length ? { tool_calls: calls } : {}) };
}

const asked = { model: MODEL, temperature: 0 };
const streamed = { stream: true, stream_options: { include_usage: true } };

const openaiChat = (form) =>
  converse(async (messages, options) => {
    const completions = openai().chat.completions;
    if (isStreamed(form)) return collected(await completions.create({ ...asked, messages, ...options, ...streamed }));
    return (await completions.create({ ...asked, messages, ...options })).choices[0].message;
  }, form);

const openaiStream = (form) =>
  converse(async (messages, options) => {
    const stream = openai().chat.completions.stream({ ...asked, messages, ...options, stream_options: { include_usage: true } });
    const got = await stream.finalChatCompletion();
    if (!got.usage) throw new Error("no usage arrived");
    return got.choices[0].message;
  }, form);

async function anthropicMessages(form) {
  const api = new Anthropic({ baseURL: ADDRESS, apiKey: "x", maxRetries: 0 }).messages;
  const tools = [{ name: "miles", description: FUNCTION.description, input_schema: PARAMETERS }];
  const messages = [{ role: "user", content: question(form) }];
  const calls = [];
  for (let turn = 0; turn < 3; turn++) {
    const body = { ...asked, max_tokens: 300, messages, ...(isTool(form) ? { tools } : {}) };
    const got = isStreamed(form) ? await api.stream(body).finalMessage() : await api.create(body);
    if (!got.usage.input_tokens) throw new Error("no usage arrived");
    const uses = got.content.filter((block) => block.type === "tool_use");
    if (!uses.length) return { text: got.content.map((block) => block.text).join(""), calls };
    const results = [];
    for (const use of uses) {
      calls.push([use.name, use.input]);
      results.push({ type: "tool_result", tool_use_id: use.id, content: String(miles(use.input)) });
    }
    messages.push({ role: "assistant", content: got.content }, { role: "user", content: results });
  }
  throw new Error("the model calls the tool again and again");
}

const aiModel = () => createOpenAICompatible({
  name: "mistral", baseURL: `${ADDRESS}/v1`, apiKey: "x", includeUsage: true, supportsStructuredOutputs: true,
})(MODEL);

async function aiText(form) {
  const calls = [];
  const execute = async (args) => {
    calls.push(["miles", args]);
    return miles(args);
  };
  const tools = { miles: tool({ description: FUNCTION.description, inputSchema: jsonSchema(PARAMETERS), execute }) };
  const options = {
    model: aiModel(), prompt: question(form), temperature: 0, maxRetries: 0, stopWhen: stepCountIs(3),
    ...(isTool(form) ? { tools } : {}),
  };
  if (!isStreamed(form)) {
    const got = await generateText(options);
    if (!got.usage.inputTokens) throw new Error("no usage arrived");
    return { text: got.text, calls };
  }
  let failure, text = "";
  const got = streamText({ ...options, onError: ({ error }) => { failure = error; } });
  for await (const part of got.textStream) text += part;
  if (failure) throw failure;
  if (!(await got.usage).inputTokens) throw new Error("no usage arrived");
  return { text, calls };
}

async function aiObject(form, n) {
  const options = {
    model: aiModel(), prompt: invent(n), schema: jsonSchema(PERSON), maxRetries: 0, seed: n, maxOutputTokens: CUT,
  };
  if (!isStreamed(form)) {
    try {
      return { json: (await generateObject(options)).object };
    } catch (error) {
      if (error.finishReason === "length") throw new Error("length");
      throw error;
    }
  }
  let failure;
  const got = streamObject({ ...options, onError: ({ error }) => { failure = error; } });
  for await (const _ of got.partialObjectStream);
  if (failure) throw failure;
  return { json: await got.object };
}

const langchainModel = (options) =>
  new ChatOpenAI({ model: MODEL, apiKey: "x", maxRetries: 0, configuration: { baseURL: `${ADDRESS}/v1` }, ...options });

async function langchain(form) {
  let model = langchainModel({ temperature: 0 });
  if (isTool(form)) model = model.bindTools(TOOLS);
  const messages = [new HumanMessage(question(form))];
  const calls = [];
  for (let turn = 0; turn < 3; turn++) {
    let got;
    if (isStreamed(form)) for await (const chunk of await model.stream(messages)) got = got ? got.concat(chunk) : chunk;
    else got = await model.invoke(messages);
    if (!got.usage_metadata) throw new Error("no usage arrived");
    if (!got.tool_calls?.length) return { text: got.content, calls };
    messages.push(got);
    for (const call of got.tool_calls) {
      calls.push([call.name, call.args]);
      messages.push(new ToolMessage({ content: String(miles(call.args)), tool_call_id: call.id }));
    }
  }
  throw new Error("the model calls the tool again and again");
}

async function langchainJson(form, n) {
  const model = langchainModel({ maxTokens: CUT }).withStructuredOutput(PERSON, { name: "person", method: "jsonSchema", strict: true });
  if (!isStreamed(form)) return { json: await model.invoke(invent(n)) };
  let got;
  for await (const part of await model.stream(invent(n))) got = part;
  return { json: got };
}

const openaiJson = async (form, n) => {
  const response_format = { type: "json_schema", json_schema: { name: "person", strict: true, schema: PERSON } };
  const body = { model: MODEL, messages: [{ role: "user", content: invent(n) }], response_format, seed: n, max_tokens: CUT };
  return { json: JSON.parse((await openai().chat.completions.parse(body)).choices[0].message.content) };
};

const WORDS = ["text", "text streamed", "tool", "tool streamed"];
const CASES = {};
const declare = (client, run, forms) => { for (const form of forms) CASES[`${client}|${form}`] = run; };
declare("openai (js)", openaiChat, WORDS);
declare("openai .parse() (js)", openaiJson, ["json"]);
declare("openai .stream() (js)", openaiStream, ["text streamed", "tool streamed"]);
declare("anthropic (js)", anthropicMessages, WORDS);
declare("ai-sdk generateText, streamText (js)", aiText, WORDS);
declare("ai-sdk generateObject, streamObject (js)", aiObject, ["json", "json streamed"]);
declare("langchain (js)", langchain, WORDS);
declare("langchain withStructuredOutput (js)", langchainJson, ["json", "json streamed"]);

async function run(client, form, n) {
  const start = performance.now();
  const line = { client, form, n };
  try {
    Object.assign(line, await CASES[`${client}|${form}`](form, n));
  } catch (error) {
    line.error = `${error.constructor.name}: ${error.message}`.slice(0, 600);
  }
  console.log(JSON.stringify({ ...line, seconds: Math.round((performance.now() - start) / 10) / 100 }));
}

if (JOBS === "list") console.log(JSON.stringify(Object.keys(CASES).map((key) => key.split("|"))));
else
  for (const [client, form, count, atOnce] of JSON.parse(JOBS)) {
    let next = 0;
    const worker = async () => { while (next < count) await run(client, form, next++); };
    await Promise.all(Array.from({ length: atOnce }, worker));
  }
