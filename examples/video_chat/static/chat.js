// The app's side of the conversation: one question, streamed.

export class Problem extends Error {}

/**
 * Asks, and yields the app's events: {text}, and at the end {id, finish_reason, report, summary}.
 * Throws a Problem whose message is for the person, or an AbortError once `signal` aborts.
 */
export async function* ask(conversation, signal) {
  const response = await send(conversation, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  while (true) {
    const { done, value } = await read(reader, signal);
    if (done) throw new Problem("The app ended the answer in the middle.");
    const events = (buffer + value).split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const data = JSON.parse(event.slice("data: ".length));
      if (data.error) throw new Problem(data.error);
      yield data;
      if (data.finish_reason) return;
    }
  }
}

async function send(conversation, signal) {
  const body = JSON.stringify(conversation);
  let response;
  try {
    response = await fetch("chat", { method: "POST", body, signal });
  } catch (error) {
    throw signal.aborted ? error : new Problem("This page's app does not answer. Is it still running?");
  }
  if (!response.ok) throw new Problem(await response.text());
  return response;
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    throw signal.aborted ? error : new Problem("This page's app went away in the middle of the answer.");
  }
}
