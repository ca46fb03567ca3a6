// The playground: sliders to a preference header, a prompt to a streamed answer. Talks to its own server only.

const $ = (id) => document.getElementById(id);
const HEADERS = {
  'x-dynmerge-applied': 'Applied', 'x-dynmerge-method': 'Method', 'x-dynmerge-merge-id': 'Merge',
  'cache-status': 'Cache', 'server-timing': 'Timing',
};
let running = null;

const authorization = () => ($('key').value ? { Authorization: `Bearer ${$('key').value}` } : {});

function fail(message) {
  $('error').textContent = message;
  $('error').hidden = !message;
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error?.message ?? `the server answered ${response.status}`);
}

async function connect() {
  const { data } = await (await checked(await fetch('/v1/models', { headers: authorization() }))).json();
  $('model').textContent = data[0].id;
  const skills = data.filter((model) => model.dynmerge === 'skill').map((model) => model.id);
  const presets = data.filter((model) => model.dynmerge === 'preset').map((model) => model.id);
  $('skills').replaceChildren(...skills.map(slider));
  $('preset').replaceChildren(new Option('none', ''), ...presets.map((name) => new Option(name, name)));
  show();
  await connectExperiments();
}

async function connectExperiments() {
  const response = await fetch('/v1/experiments', { headers: authorization() });
  const found = response.ok ? (await response.json()).data.filter((each) => each.state === 'running') : [];
  $('experiments').hidden = !found.length;
  $('experiment').replaceChildren(...found.map(({ name }) => new Option(name, name)));
  showReport();
}

const path = () => `/v1/experiments/${encodeURIComponent($('experiment').value)}`;
const showReport = () => { $('report').href = `${path()}/report.html`; };

function slider(name) {
  const label = Object.assign(document.createElement('label'), { className: 'skill', textContent: name });
  const value = Object.assign(document.createElement('output'), { textContent: '0' });
  const input = Object.assign(document.createElement('input'), { type: 'range', min: 0, max: 1, step: 0.05, value: 0, name });
  input.addEventListener('input', () => { value.textContent = input.value; $('preset').value = ''; show(); });
  label.append(value, input);
  return label;
}

function wish() {
  const method = $('method').value.trim() ? { 'X-Dynmerge-Method': $('method').value.trim() } : {};
  if ($('preset').value) return { 'X-Dynmerge-Preset': $('preset').value, ...method };
  const chosen = [...$('skills').querySelectorAll('input')].filter((input) => Number(input.value) > 0);
  const text = chosen.map((input) => `${input.name}=${input.value}`).join(', ');
  return { 'X-Dynmerge-Preference': text || 'base=1', ...method };
}

const show = () => { $('header').textContent = Object.entries(wish()).map(([name, value]) => `${name}: ${value}`).join('\n'); };

function showApplied(response) {
  const rows = Object.entries(HEADERS).filter(([name]) => response.headers.get(name));
  $('applied').replaceChildren(...rows.flatMap(([name, title]) => [
    Object.assign(document.createElement('dt'), { textContent: title }),
    Object.assign(document.createElement('dd'), { textContent: response.headers.get(name) }),
  ]));
}

async function* events(response) {
  let rest = '';
  for await (const text of pieces(response.body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + text).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith('data: ') && line !== 'data: [DONE]') yield JSON.parse(line.slice(6));
    }
  }
}

async function* pieces(stream) { // Safari's streams are not iterable
  const reader = stream.getReader();
  for (let step = await reader.read(); !step.done; step = await reader.read()) yield step.value;
}

async function send() {
  running = new AbortController();
  const body = {
    messages: [{ role: 'user', content: $('prompt').value }], stream: true,
    max_tokens: $('tokens').valueAsNumber, temperature: $('temperature').valueAsNumber,
  };
  const response = await checked(await fetch('/v1/chat/completions', {
    method: 'POST', signal: running.signal, body: JSON.stringify(body),
    headers: { 'Content-Type': 'application/json', ...authorization(), ...wish() },
  }));
  showApplied(response);
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    $('answer').textContent += event.choices[0]?.delta.content ?? '';
  }
}

async function post(where, body) {
  const headers = { 'Content-Type': 'application/json', ...authorization() };
  return (await checked(await fetch(where, { method: 'POST', body: JSON.stringify(body), headers }))).json();
}

async function comparePair() {
  $('pairs').replaceChildren();
  $('voted').textContent = '';
  const { id, answers } = await post(`${path()}/compare`, {
    messages: [{ role: 'user', content: $('prompt').value }],
    max_tokens: $('tokens').valueAsNumber, temperature: $('temperature').valueAsNumber,
  });
  const shown = answers.map(({ choices }) => Object.assign(document.createElement('article'), { textContent: choices[0].message.content }));
  const votes = [['first', 'The first'], ['tie', 'Neither'], ['second', 'The second']].map(([value, text]) => vote(id, value, text));
  const row = Object.assign(document.createElement('div'), { className: 'row' });
  row.append(...votes);
  $('pairs').replaceChildren(...shown, row);
}

function vote(id, value, text) {
  const button = Object.assign(document.createElement('button'), { type: 'button', textContent: text });
  button.addEventListener('click', () => attempt(async () => {
    await post('/v1/feedback', { request_id: id, name: 'vote', value, id: `vote-${id}` });
    for (const each of button.parentElement.children) each.disabled = true;
    $('voted').textContent = `${text}: thank you.`;
  }));
  return button;
}

async function attempt(work) {
  fail('');
  try { await work(); } catch (error) { if (error.name !== 'AbortError') fail(error.message); }
}

$('form').addEventListener('submit', async (event) => {
  event.preventDefault();
  $('answer').textContent = '';
  $('applied').replaceChildren();
  $('send').disabled = true;
  $('stop').disabled = false;
  await attempt(send);
  $('send').disabled = false;
  $('stop').disabled = true;
});
$('stop').addEventListener('click', () => running?.abort());
$('pair').addEventListener('click', async () => {
  $('pair').disabled = true;
  await attempt(comparePair);
  $('pair').disabled = false;
});
$('experiment').addEventListener('change', showReport);
$('preset').addEventListener('change', show);
$('method').addEventListener('input', show);
$('key').addEventListener('change', () => attempt(connect));
attempt(connect);
