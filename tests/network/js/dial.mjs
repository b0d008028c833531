// Dials the node whose multiaddr is the argument, uses its identify, ping and Kademlia,
// and prints what they answered as one JSON object; or fails, and says while doing what.
Promise.withResolvers ??= function () { // Node 20 lacks it, libp2p 3 needs it
  let resolve, reject
  const promise = new this((a, b) => { resolve = a; reject = b })
  return { promise, resolve, reject }
}

const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { identify } = await import('@libp2p/identify')
const { ping } = await import('@libp2p/ping')
const { kadDHT, passthroughMapper } = await import('@libp2p/kad-dht')
const { multiaddr } = await import('@multiformats/multiaddr')

const KADEMLIA = '/omx/kad/1.0.0'
const BUDGET_MS = 75_000 // for everything; whoever started this waits 90 s

const expiry = new AbortController()
const expired = Promise.withResolvers()
expired.promise.catch(() => {}) // else it ends the process before the step is named
setTimeout(() => {
  const error = new Error(`not done within ${BUDGET_MS / 1_000} s`)
  expired.reject(error)
  expiry.abort(error)
}, BUDGET_MS)

async function step (doing, work) {
  const begun = performance.now()
  try {
    return await Promise.race([work, expired.promise])
  } catch (error) {
    const seconds = ((performance.now() - begun) / 1_000).toFixed(1)
    console.error(`failed while ${doing}, after ${seconds} s:`, error)
    process.exit(1)
  }
}

const node = await step('starting', createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  // A busy machine is slow, not broken: nothing may give up before the whole budget is spent,
  // for nothing of this is tried a second time.
  connectionManager: {
    dialTimeout: BUDGET_MS,
    addressDialTimeout: BUDGET_MS,
    outboundStreamProtocolNegotiationTimeout: BUDGET_MS,
    inboundStreamProtocolNegotiationTimeout: BUDGET_MS
  },
  connectionMonitor: { enabled: false }, // it pings too, and aborts a connection slow to answer
  services: {
    identify: identify({ timeout: BUDGET_MS, runOnConnectionOpen: false }),
    ping: ping({ maxOutboundStreams: 2, timeout: BUDGET_MS }), // the last may be closing
    dht: kadDHT({
      protocol: KADEMLIA,
      peerInfoMapper: passthroughMapper, // else it drops loopback addresses
      clientMode: true,
      onPeerConnectTimeout: BUDGET_MS,
      pingNewContactTimeout: { minTimeout: BUDGET_MS, maxTimeout: BUDGET_MS },
      networkDialTimeout: { minTimeout: BUDGET_MS, maxTimeout: BUDGET_MS }
    })
  }
}))

const address = multiaddr(process.argv[2])
const { identify: identifying, ping: pinging, dht } = node.services
const added = new Promise(resolve => {
  dht.routingTable.addEventListener('peer:add', resolve, { once: true })
})

const signal = expiry.signal
const connection = await step('dialling', node.dial(address, { signal }))
const identified = await step('identifying', identifying.identify(connection, { signal }))
// Now that it knows the node's protocols, kad-dht pings the node, and does so only once: if that
// fails, it takes the node for dead and no query ever begins. So nothing may ping meanwhile:
// libp2p allows one ping at a time, and the ping that finds another under way fails at once.
await step('waiting for kad-dht to find it alive', added)
const pingMs = await step('pinging', pinging.ping(connection.remotePeer, { signal }))

async function ask () {
  const heard = []
  const key = connection.remotePeer.toMultihash().bytes
  for await (const event of dht.getClosestPeers(key, { signal })) {
    if (event.name === 'PEER_RESPONSE') heard.push(event.from.toString())
    if (event.name === 'QUERY_ERROR') throw event.error
  }
  return heard
}
// It begins when kad-dht has asked for its own neighbours, a second after its start.
const heard = await step('asking its Kademlia', ask())

console.log(JSON.stringify({
  peer: connection.remotePeer.toString(),
  agent: identified.agentVersion,
  protocols: identified.protocols,
  encryption: connection.encryption,
  multiplexer: connection.multiplexer,
  pingMs,
  kademlia: heard
}))
await step('stopping', node.stop())
process.exit(0)
