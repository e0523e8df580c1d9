// The token view of a trace. Latents are lit by one style sheet of a few rules, so the cost does not grow with the
// number of tokens, and texts that are built later are lit like the others. All events are heard at the document.
(() => {
  'use strict';
  const sheet = new CSSStyleSheet();
  document.adoptedStyleSheets = [sheet];
  const main = document.querySelector('main');
  const bar = document.getElementById('bar');
  const litLine = document.getElementById('lit');
  const tokenLine = document.getElementById('token');
  const STEPS = {a: 14, b: 28, c: 44, d: 60};
  const counts = new WeakMap();
  let hovered = null, focused = null, pinned = null, lit = null;

  const named = value => (/^\d+$/.test(value ?? '') ? value : null);
  const chipOf = target => target.closest?.('.chip') ?? null;
  const tokenOf = target => target.closest?.('.t') ?? null;
  const plural = (n, word) => `${n.toLocaleString('en')} ${word}${n === 1 ? '' : 's'}`;

  // One class a selector: the browser then looks at the elements of that class alone.
  function rules(latent) {
    const depth = Object.entries(STEPS).map(([step, share]) =>
      `.k${latent}${step}{background:color-mix(in srgb,var(--lit) ${share}%,transparent)!important}`);
    const any = Object.keys(STEPS).map(step => `.k${latent}${step}`).join(',');
    return `${depth.join('')}${any}{text-decoration:underline solid var(--lit) 2px!important}` +
      `.chip[data-latent="${latent}"]{border-color:var(--lit);box-shadow:inset 0 0 0 1px var(--lit)}`;
  }

  function countsOf(element) {
    if (!counts.has(element)) {
      counts.set(element, new Map(element.dataset.counts.split(' ').map(pair => pair.split(':'))));
    }
    return counts.get(element);
  }

  function show() {
    const latent = hovered ?? focused ?? pinned;
    if (latent === lit) { return; }
    lit = latent;
    sheet.replaceSync(latent === null ? '' : rules(latent));
    main.classList.toggle('dimmed', latent !== null);
    let folded = 0;
    for (const element of document.querySelectorAll('[data-counts]')) {
      const tokens = latent === null ? 0 : Number(countsOf(element).get(latent) ?? 0);
      element.textContent = tokens ? `lit: ${plural(tokens, 'token')}` : '';
      const closed = element.closest('details').querySelector(':scope > template') !== null;
      folded += closed ? tokens : 0;
    }
    const open = latent === null ? 0 : document.querySelectorAll(
      Object.keys(STEPS).map(step => `.k${latent}${step}`).join(',')).length;
    litLine.textContent = latent === null ? '' :
      `Latent ${latent} is lit on ${plural(open, 'token')}` +
      (folded ? `, and on ${plural(folded, 'token')} of folded texts` : '') +
      (latent === pinned ? '; kept until Escape.' : '.');
    for (const chip of document.querySelectorAll('.chip[aria-pressed]')) {
      chip.setAttribute('aria-pressed', String(pinned !== null && chip.dataset.latent === pinned));
    }
    said();
  }

  function said() { bar.classList.toggle('empty', !litLine.textContent && !tokenLine.textContent); }

  function again() { lit = undefined; show(); }

  function pin(latent) {
    pinned = pinned === latent ? null : latent;
    again();
  }

  function firing(token) {
    return token.dataset.f.split(';').map(part => part.split(','));
  }

  function tell(token) {
    if (!token) { tokenLine.textContent = ''; return said(); }
    const text = token.textContent.trim() || 'blank';
    const parts = firing(token).map(([latent, activation, value, own]) =>
      `latent ${latent}: activation ${activation}` + (value ? `, × influence ${value}` : '') +
      (own ? `, the token's own influence ${own}` : ''));
    tokenLine.textContent = `“${text}” — ${parts.join('; ')}`;
    said();
  }

  // Folded parts are made when they are first opened.
  function build(details) {
    const template = details.querySelector(':scope > template');
    if (template) { template.replaceWith(template.content); }
    return template !== null;
  }

  function step(group, from, by) {
    const all = [...group.children].filter(e => e.matches('.chip'));
    const to = by === 'Home' ? 0 : by === 'End' ? all.length - 1 :
      (all.indexOf(from) + (by === 'ArrowRight' ? 1 : -1) + all.length) % all.length;
    from.tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  }

  function walk(tokens, token, key) {
    const all = [...tokens.querySelectorAll('.t')];
    const at = token ? all.indexOf(token) : -1;
    let to = null;
    if (key === 'Home') { to = all[0]; }
    if (key === 'End') { to = all[all.length - 1]; }
    if (key === 'ArrowRight') { to = all[at + 1]; }
    if (key === 'ArrowLeft') { to = all[at - 1]; }
    if (key === 'ArrowDown' || key === 'ArrowUp') {
      const latent = pinned ?? (token ? firing(token)[0][0] : null);
      const same = e => latent === null || firing(e).some(part => part[0] === latent);
      to = key === 'ArrowDown' ? all.slice(at + 1).find(same) : all.slice(0, Math.max(at, 0)).findLast(same);
    }
    if (!to) { return; }
    to.tabIndex = -1;
    to.setAttribute('role', 'button');
    to.focus();
    tell(to);
    to.setAttribute('aria-label', tokenLine.textContent);
  }

  document.addEventListener('mouseover', event => {
    const chip = chipOf(event.target);
    hovered = chip ? named(chip.dataset.latent) : null;
    show();
    const token = tokenOf(event.target);
    if (token || !tokenOf(document.activeElement)) { tell(token); }
  });
  document.documentElement.addEventListener('mouseleave', () => { hovered = null; show(); });
  document.addEventListener('focusin', event => {
    const chip = chipOf(event.target);
    focused = chip ? named(chip.dataset.latent) : null;
    show();
  });
  document.addEventListener('focusout', event => {
    if (tokenOf(event.target)) {
      event.target.removeAttribute('tabindex');
      event.target.removeAttribute('role');
      event.target.removeAttribute('aria-label');
      tell(null);
    }
    if (chipOf(event.target)) { focused = null; show(); }
  });
  document.addEventListener('click', event => {
    const chip = chipOf(event.target), token = tokenOf(event.target);
    if (chip) { pin(named(chip.dataset.latent)); }
    if (token && getSelection().isCollapsed) { pin(named(firing(token)[0][0])); tell(token); }
    if (event.target.id === 'open') {
      for (let found; (found = document.querySelectorAll('details.lazy:not([open])')).length;) {
        for (const details of found) { build(details); details.open = true; }
      }
      again();
    }
  });
  document.addEventListener('change', event => {
    if (event.target.name === 'relative') { main.dataset.relative = event.target.value; }
  });
  document.addEventListener('keydown', event => {
    if (event.ctrlKey || event.metaKey || event.altKey) { return; }
    const chip = chipOf(event.target), token = tokenOf(event.target);
    const tokens = event.target.closest?.('.tokens') ?? null;
    if (event.key === 'Escape') {
      hovered = focused = pinned = null;
      again();
      tell(null);
      if (token) { tokens.focus(); }
    } else if (chip && ['ArrowRight', 'ArrowLeft', 'Home', 'End'].includes(event.key)) {
      step(chip.parentElement, chip, event.key);
      event.preventDefault();
    } else if (tokens && ['ArrowRight', 'ArrowLeft', 'ArrowUp', 'ArrowDown', 'Home', 'End'].includes(event.key)) {
      walk(tokens, token, event.key);
      event.preventDefault();
    } else if (token && (event.key === 'Enter' || event.key === ' ')) {
      pin(named(firing(token)[0][0]));
      event.preventDefault();
    }
  });
  document.addEventListener('toggle', event => {
    if (event.target.matches?.('details.lazy') && event.target.open && build(event.target)) { again(); }
  }, true);
})();
